"""A trace's segments as programs for the two pools of the allocator. Pure.

A block that is born in a layer is named by how far above that layer the program is, so that all copies of a
layer have one program, and chunks at different heights meet equal states
(:mod:`chunkplan.planner.allocator.pool`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from chunkplan.planner.allocator.pool import LARGEST_SMALL, Op, Program, units, without_round_trips
from chunkplan.planner.trace.layers import Copies, births, freed_everywhere, real_places
from chunkplan.planner.trace.step_trace import HEAD, StepTrace

OTHER_NAMES = -(1 << 60)
"""Names from here downwards are free for blocks that are not a step's."""
_PHASES = {"forward": 1, "backward": 2, "end": 3}
_HERE = 1 << 15
_DISTANCE = (1 << 16) - 1


class Ops:
    """Operations of both pools, in order within each."""

    __slots__ = ("_pools", "_programs", "gradients")

    def __init__(self) -> None:
        self._pools: tuple[list[Op], list[Op]] = ([], [])
        self._programs: tuple[Program | None, ...] | None = None
        self.gradients: list[tuple[int, int]] = []
        """(name, ordinal of the traced slice) of the gradients that come."""

    def take(self, name: int, size_bytes: int) -> None:
        """A block comes."""
        if size_bytes:
            size = units(size_bytes)
            self._pools[size <= LARGEST_SMALL].append((size, name))

    def give(self, name: int, size_bytes: int) -> None:
        """A block of that size goes."""
        if size_bytes:
            self._pools[units(size_bytes) <= LARGEST_SMALL].append((0, name))

    def programs(self, known: dict[tuple[Op, ...], Program]) -> tuple[Program | None, ...]:
        """Return the programs of the large and the small pool; None for one with nothing to do. Ends the
        list.
        """
        if self._programs is None:
            found = []
            for pool in self._pools:
                key = tuple(pool)
                if key and key not in known:
                    known[key] = Program(key)
                found.append(known[key] if key else None)
            self._programs = tuple(found)
        return self._programs


class StepPrograms:
    """One trace, prepared for chunks whose layers have the same roles."""

    def __init__(self, trace: StepTrace) -> None:
        self.trace = trace
        self._born = births(trace)
        self._shared = [freed_everywhere(segment, self._born) for segment in trace.segments]
        self._ordinals = [_ordinals(trace, segment.events) for segment in trace.segments]
        self._known: dict[Hashable, Ops] = {}

    def segment(
        self,
        index: int,
        copies: Copies,
        numels: Sequence[int],
        itemsize: int,
        update: Callable[[Ops, int, int, int], None] | None = None,
    ) -> Ops:
        """What one copy of a segment does.

        Args:
            index: of the segment.
            copies: of the traced layers.
            numels: elements of the slices that the traced ones stand for.
            itemsize: bytes per element of a gradient.
            update: called for a gradient that is freed, with the operations, its name, its size in bytes and
                the ordinal of its traced slice; None frees it.
        """
        ordinals = self._ordinals[index]
        layers = copies if self.trace.segments[index].place < 0 else None
        key = (index, layers, itemsize, *(numels[ordinal] for ordinal in ordinals))
        if update is not None and ordinals:
            return self._segment(index, copies, numels, itemsize, update)
        if key not in self._known:
            self._known[key] = self._segment(index, copies, numels, itemsize, None)
        return self._known[key]

    def _segment(
        self,
        index: int,
        copies: Copies,
        numels: Sequence[int],
        itemsize: int,
        update: Callable[[Ops, int, int, int], None] | None,
    ) -> Ops:
        trace, born, shared = self.trace, self._born, self._shared[index]
        segment = trace.segments[index]
        base = base_of(segment.place, copies)
        ops = Ops()
        for event in segment.events:
            block = trace.blocks[event if event >= 0 else -1 - event]
            size_bytes, gradient = block.size_bytes, block.slice_ordinal
            if gradient >= 0:
                size_bytes += (numels[gradient] - trace.slice_numels[gradient]) * itemsize
            phase, _, ordinal = birth = born[event if event >= 0 else -1 - event]
            for place in real_places(segment, base, birth, copies, shared):
                name = _outside(phase, ordinal, place) if place < 0 else _in_layer(phase, ordinal, base - place)
                if event >= 0:
                    ops.take(name, size_bytes)
                    if gradient >= 0:
                        ops.gradients.append((name, gradient))
                elif update is not None and gradient >= 0:
                    update(ops, name, size_bytes, gradient)
                else:
                    ops.give(name, size_bytes)
        return ops


def base_of(place: int, copies: Copies) -> int:
    """Where a segment outside the layers stands among them; a traced layer's first copy."""
    if place >= 0:
        return copies.first[place]
    return sum(copies.num) if place == HEAD else -1


def block_identity(name: int, base: int) -> tuple[int, int]:
    """A block of a layer or outside, wherever it is named from: ``base`` is where the program is that names
    it so.
    """
    return (name, 0) if name < 0 else (name >> 16, base - (name & _DISTANCE) + _HERE)


def _in_layer(phase: str, ordinal: int, above: int) -> int:
    return (_PHASES[phase] << 32 | ordinal) << 16 | _HERE + above


def _outside(phase: str, ordinal: int, place: int) -> int:
    return -((_PHASES[phase] << 32 | ordinal) << 2 | -place)


def _ordinals(trace: StepTrace, events: Sequence[int]) -> list[int]:
    """Return ordinals of the traced slices whose gradients come or go among the events."""
    found = {trace.blocks[event if event >= 0 else -1 - event].slice_ordinal for event in events}
    return sorted(ordinal for ordinal in found if ordinal >= 0)


def rule_events(trace: StepTrace) -> Sequence[int]:
    """Return the events of a slice's update, without what clipping takes before."""
    (segment,) = (segment for segment in trace.segments if segment.phase == "optimizer")
    return segment.events


class UpdateProgram:
    """The update of a slice: its blocks are named by their numbers in the trace, the gradient is 0."""

    def __init__(self, trace: StepTrace) -> None:
        ops: tuple[list[Op], list[Op]] = ([], [])
        sizes = [units(block.size_bytes) for block in trace.blocks]
        live: set[int] = set()
        for event in rule_events(trace):
            number = event if event >= 0 else -1 - event
            size = sizes[number]
            if not size:
                continue
            if event >= 0:
                ops[size <= LARGEST_SMALL].append((size, number))
                live.add(number)
            else:
                ops[size <= LARGEST_SMALL].append((0, number))
                live.discard(number)
        self._ops = tuple(map(without_round_trips, ops))
        self.num_blocks = len(trace.blocks)
        self.staying = sorted(live - {0})
        """Blocks that are not given back."""

    def operations(self, *, is_small: bool, first: int, gradient: int) -> list[Op]:
        """Operations of one pool; block n is called ``first`` − n if anybody outside of them may see it."""
        return [
            (size, number if number.__class__ is tuple else first - number if number else gradient)
            for size, number in self._ops[is_small]
        ]


class ReplayPrograms:
    """The traces of one model as the replay wants them: each is prepared once, for all replays."""

    def __init__(self) -> None:
        self.interned: dict[tuple[Op, ...], Program] = {}
        """Programs of the pools that were met."""
        self._steps: dict[StepTrace, StepPrograms] = {}
        self._updates: dict[StepTrace, UpdateProgram] = {}

    def step(self, trace: StepTrace) -> StepPrograms:
        """For a traced step."""
        if trace not in self._steps:
            self._steps[trace] = StepPrograms(trace)
        return self._steps[trace]

    def update(self, trace: StepTrace) -> UpdateProgram:
        """For a traced update of a slice."""
        if trace not in self._updates:
            self._updates[trace] = UpdateProgram(trace)
        return self._updates[trace]
