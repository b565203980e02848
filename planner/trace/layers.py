"""The layers of a step: which are traced, what each stands for, and whose block a copy of it frees. Pure.

A repeated layer refers to its neighbours' memory (it frees its predecessor's output, say). In the trace such
a reference names a block by its birth: the phase and the place it was born in and its number there. The same
number is looked up in the neighbour's copy, which is the same kind of layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chunkplan.planner.trace.step_trace import HEAD, Segment, StepTrace

Birth = tuple[str, int, int]
"""(phase, traced place, number within the segment) of a block."""


@dataclass(frozen=True, slots=True)
class LayerRun:
    """Consecutive layers that do the same in a step: three are traced, the middle one stands for
    ``num_layers`` − 2.
    """

    first: int
    num_layers: int

    @property
    def traced(self) -> tuple[int, ...]:
        """Indices of the layers that are traced."""
        if self.num_layers <= 3:
            return tuple(range(self.first, self.first + self.num_layers))
        return self.first, self.first + 1, self.first + self.num_layers - 1

    @property
    def repeats(self) -> tuple[int, ...]:
        """How many real layers each traced one stands for."""
        return (1,) * self.num_layers if self.num_layers <= 3 else (1, self.num_layers - 2, 1)


def layer_runs(roles: Sequence[object]) -> list[LayerRun]:
    """Group equal neighbours."""
    runs: list[LayerRun] = []
    for index, role in enumerate(roles):
        if index and role == roles[index - 1]:
            runs[-1] = LayerRun(runs[-1].first, runs[-1].num_layers + 1)
        else:
            runs.append(LayerRun(index, 1))
    return runs


@dataclass(frozen=True, slots=True)
class Copies:
    """How many real layers each traced one stands for, and the first of them."""

    first: tuple[int, ...]
    num: tuple[int, ...]

    @staticmethod
    def of(runs: Sequence[LayerRun]) -> Copies:
        """For the traced layers of ``runs``."""
        first: list[int] = []
        num: list[int] = []
        for run in runs:
            layer = run.first
            for repeat in run.repeats:
                first.append(layer)
                num.append(repeat)
                layer += repeat
        return Copies(tuple(first), tuple(num))

    def real(self, place: int) -> range:
        """The real layers of a traced one."""
        return range(self.first[place], self.first[place] + self.num[place])

    def num_of(self, place: int) -> int:
        """How many copies a segment at a place has: outside the layers, one."""
        return self.num[place] if place >= 0 else 1


NO_COPIES = Copies((), ())


def births(trace: StepTrace) -> list[Birth]:
    """The birth of every block."""
    born: list[Birth] = [("", 0, 0)] * len(trace.blocks)
    for segment in trace.segments:
        allocations = [event for event in segment.events if event >= 0]
        for ordinal, block in enumerate(allocations):
            born[block] = (segment.phase, segment.place, ordinal)
    return born


def freed_everywhere(segment: Segment, born: Sequence[Birth]) -> set[Birth]:
    """Births in layers whose like this segment, outside the layers, frees in both traced neighbours too.

    Where such a layer is repeated, the segment frees that memory of every copy.
    """
    if segment.place >= 0:
        return set()
    freed = {born[-1 - event] for event in segment.events if event < 0}
    return {
        (phase, place, ordinal)
        for phase, place, ordinal in freed
        if place >= 0 and (phase, place - 1, ordinal) in freed and (phase, place + 1, ordinal) in freed
    }  # fmt: skip


def real_places(segment: Segment, here: int, birth: Birth, copies: Copies, shared: set[Birth]) -> Sequence[int]:
    """Real places of the blocks that a traced one stands for, seen from one copy of a segment.

    Args:
        segment: takes or frees the block.
        here: where the copy really is; read only for a segment of a layer.
        birth: the block's.
        copies: of the traced layers.
        shared: births whose block the segment frees in all copies, see :func:`freed_everywhere`.
    """
    _, place, _ = birth
    if place < 0:
        return (place,)
    if segment.place >= 0:
        return (here + place - segment.place,)
    real = copies.real(place)
    if birth in shared:
        return real
    # Outside the layers, neighbours are counted from the near end: the head follows the last layer.
    return real[-1:] if segment.place == HEAD else real[:1]
