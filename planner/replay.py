"""Reserved memory: replays a cycle through the simulated CUDA caching allocator. Pure but for the trace store."""

from __future__ import annotations

from collections.abc import Iterable

from engine.chunks import Slice
from engine.schedule import Schedule
from engine.spec import ScheduleSpec
from planner.allocator import CachingAllocator
from planner.compose import compose
from planner.footprint import ChunkFootprint, Footprints, Update, updates_of_visit
from planner.overheads import Overheads
from planner.structure import stand_ins


def reserved_bytes(
    footprints: Footprints, chunks: Iterable[ChunkFootprint], schedule: ScheduleSpec, overheads: Overheads
) -> int:
    """Highest reserved bytes over one cycle in the schedule's order, weights and library workspaces included."""
    allocator = CachingAllocator()
    replay = _Replay(allocator, footprints, schedule)
    replay.load(overheads)
    by_index = {footprint.chunk.index: footprint for footprint in chunks}
    for index in Schedule(len(by_index), schedule.order, 1).cycle_order(0):
        replay.visit(by_index[index])
    return allocator.max_reserved_bytes


class _Replay:
    """Feeds the allocator; block numbers are unique over the cycle."""

    def __init__(self, allocator: CachingAllocator, footprints: Footprints, schedule: ScheduleSpec) -> None:
        self._allocator = allocator
        self._footprints = footprints
        self._schedule = schedule
        self._next = 0

    def load(self, overheads: Overheads) -> None:
        """Weights and buffers, then the libraries' workspaces."""
        structure = self._footprints.structure
        sizes = [*structure.parameter_sizes, structure.buffer_bytes]
        if self._schedule.expansion == "factored":
            sizes += self._footprints.factored_bytes()
        for size_bytes in sizes + [overheads.workspace_bytes] * overheads.num_workspaces:
            if size_bytes:
                self._malloc(size_bytes)

    def visit(self, footprint: ChunkFootprint) -> None:
        """All kinds of update of one visit, one after another."""
        states: list[int] = []
        for update in updates_of_visit(self._schedule):
            states = self._update(footprint, update, states)

    def _update(self, footprint: ChunkFootprint, update: Update, states: list[int]) -> list[int]:
        itemsize = self._footprints.training.trained_precision.itemsize
        pieces = footprint.chunk.slices
        slices = stand_ins(self._footprints.structure, footprint.chunk, footprint.runs)
        numels = [pieces[ordinals[0]].numel for ordinals in slices]
        gradients: dict[int, int] = {}
        accumulates = self._footprints.training.gradient_accumulation_steps > 1
        if accumulates:
            gradients = {i: self._malloc(piece.numel * itemsize) for i, piece in enumerate(pieces)}
        is_in_backward = self._footprints.training.update_in_backward
        live: dict[int, tuple[int, int]] = {}
        staying: list[int] = []
        for segment in compose(footprint.trace, footprint.runs, numels, itemsize, slices):
            for number, size_bytes, ordinal in segment.events:
                if size_bytes >= 0:
                    live[number] = self._malloc(size_bytes), ordinal
                    continue
                block, _ = live.pop(number)
                if is_in_backward and ordinal >= 0:
                    staying += self._update_slice(pieces[ordinal], update, block)
                else:
                    self._allocator.free(block)
        gradients |= {ordinal: block for block, ordinal in live.values() if ordinal >= 0}
        buffers = [
            self._malloc(size_bytes) for size_bytes in self._footprints.buffers(footprint.chunk, self._schedule, update)
        ]
        for position, block in sorted(gradients.items()):
            staying += self._update_slice(pieces[position], update, block)
        for block in buffers:
            self._allocator.free(block)
        for block, ordinal in live.values():
            if ordinal < 0:
                self._allocator.free(block)
        if update.leaves:
            for block in states:
                self._allocator.free(block)
        return staying if update.comes else states

    def _update_slice(self, piece: Slice, update: Update, gradient: int) -> list[int]:
        """Update the slice and free its gradient; returns the blocks of states that stay on the device."""
        trace = self._footprints.update_trace(piece, self._schedule, update)
        blocks = {0: gradient}
        (segment,) = (segment for segment in trace.segments if segment.phase == "optimizer")
        for event in segment.events:
            if event >= 0:
                blocks[event] = self._malloc(trace.blocks[event].size_bytes)
            else:
                self._allocator.free(blocks.pop(-1 - event))
        return list(blocks.values())

    def _malloc(self, size_bytes: int) -> int:
        block = self._next
        self._allocator.malloc(block, size_bytes)
        self._next += 1
        return block
