"""From traced blocks to the events of a whole step: repeats the layers that stand for many. Pure.

A repeated layer refers to its neighbours' memory (it frees its predecessor's output, say). In the trace such
a reference names a block by the segment it was born in and its number there; here the same number is looked
up in the neighbour's copy, which is the same kind of layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from chunkplan.planner.trace.step_trace import HEAD, Block, LayerRun, Segment, StepTrace


class CompositionError(RuntimeError):
    """The traced layers do not repeat: the whole model must be traced."""


@dataclass(frozen=True, slots=True)
class ComposedSegment:
    """One segment of the whole step: its traced segment, the real layer (or place outside the layers), its
    events.

    Events are (block number, bytes, ordinal of the slice whose gradient it is or −1); negative bytes free the
    block.
    """

    phase: str
    place: int
    events: list[tuple[int, int, int]]
    traced: Segment


def compose(
    trace: StepTrace,
    runs: Sequence[LayerRun],
    slice_numels: Sequence[int],
    itemsize: int,
    slices: Sequence[Sequence[int]] = (),
) -> list[ComposedSegment]:
    """The step's segments in order of time, for all layers.

    Args:
        trace: of the distinct layers of ``runs``.
        runs: the layers of the whole model.
        slice_numels: elements of the chunk's slices that the traced ones stand for (the first of each, see
            :func:`chunkplan.planner.trace.structure.stand_ins`): gradients of cut ones are scaled from the
            traced sizes.
        itemsize: bytes per element of a gradient.
        slices: which slices those are; with them, events name the chunk's slices, else the traced ones.

    Raises:
        CompositionError: a reference between layers cannot be resolved.
    """
    layers = _Layers.of(runs)
    born = births(trace)
    blocks = [_scaled(block, trace, slice_numels, itemsize) for block in trace.blocks]
    numbers: dict[tuple[str, int, int], int] = {}
    sizes: dict[int, tuple[int, int]] = {}
    composed = []
    for segment, here in _copies(trace.segments, layers):
        shared = freed_everywhere(segment, born)
        events: list[tuple[int, int, int]] = []
        for event in segment.events:
            if event >= 0:
                number = len(sizes)
                block = blocks[event]
                numbers[segment.phase, here, born[event][2]] = number
                ordinal_of_slice = block.slice_ordinal
                if slices and ordinal_of_slice >= 0:
                    stood_for = slices[ordinal_of_slice]
                    copy = here - layers.real[segment.place][0] if len(stood_for) > 1 else 0
                    ordinal_of_slice = stood_for[copy]
                sizes[number] = (block.size_bytes, ordinal_of_slice)
                events.append((number, block.size_bytes, ordinal_of_slice))
                continue
            phase, _, ordinal = birth = born[-1 - event]
            for target in _targets(segment, here, birth, layers, shared):
                number = numbers.pop((phase, target, ordinal), -1)
                if number < 0:
                    raise CompositionError(f"{segment.phase} of {here} frees an unknown block of {phase} of {target}")
                size_bytes, ordinal_of_slice = sizes[number]
                events.append((number, -size_bytes, ordinal_of_slice))
        composed.append(ComposedSegment(segment.phase, here, events, segment))
    return composed


@dataclass(frozen=True, slots=True)
class _Layers:
    """For every traced layer, the real layers that it stands for."""

    real: list[list[int]]

    @staticmethod
    def of(runs: Sequence[LayerRun]) -> _Layers:
        real: list[list[int]] = []
        next_layer = 0
        for run in runs:
            for repeat in run.repeats:
                real.append(list(range(next_layer, next_layer + repeat)))
                next_layer += repeat
        return _Layers(real)


def births(trace: StepTrace) -> list[tuple[str, int, int]]:
    """(phase, place, number within the segment) of every block."""
    born: list[tuple[str, int, int]] = [("", 0, 0)] * len(trace.blocks)
    for segment in trace.segments:
        allocations = [event for event in segment.events if event >= 0]
        for ordinal, block in enumerate(allocations):
            born[block] = (segment.phase, segment.place, ordinal)
    return born


def _copies(segments: Sequence[Segment], layers: _Layers) -> Iterator[tuple[Segment, int]]:
    """Every segment with the real place it stands for, repeated ones in the order of their phase."""
    for segment in segments:
        if segment.place < 0:
            yield segment, segment.place
            continue
        real = layers.real[segment.place]
        yield from ((segment, layer) for layer in (real if segment.phase == "forward" else reversed(real)))


def _targets(
    segment: Segment, here: int, birth: tuple[str, int, int], layers: _Layers, shared: set[tuple[str, int, int]]
) -> list[int]:
    """Real places whose block is freed when ``segment``, really at ``here``, frees a block with
    this birth.
    """
    _, born_place, _ = birth
    if born_place < 0:
        return [born_place]
    if segment.place >= 0:
        return [here + born_place - segment.place]
    if birth in shared:
        return layers.real[born_place]
    # Outside the layers, neighbours are counted from the near end: the head follows the last layer.
    return [layers.real[born_place][-1 if segment.place == HEAD else 0]]


def freed_everywhere(segment: Segment, born: Sequence[tuple[str, int, int]]) -> set[tuple[str, int, int]]:
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


def _scaled(block: Block, trace: StepTrace, slice_numels: Sequence[int], itemsize: int) -> Block:
    """The block with the size that the planned chunk's slice gives it."""
    ordinal = block.slice_ordinal
    if ordinal < 0:
        return block
    difference = slice_numels[ordinal] - trace.slice_numels[ordinal]
    return Block(block.size_bytes + difference * itemsize, block.category, ordinal)
