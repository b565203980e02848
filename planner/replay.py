"""Reserved memory: replays a cycle through the simulated CUDA caching allocator. Pure but for the trace store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.chunks import Slice
from engine.schedule import Schedule
from engine.spec import ScheduleSpec
from planner.allocator import CachingAllocator
from planner.compose import compose
from planner.footprint import ChunkFootprint, Footprints, Update, updates_of_visit
from planner.overheads import Overheads


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
        sizes = [info.num_bytes for info in structure.parameters] + [structure.buffer_bytes]
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
        itemsize = self._footprints.training.precision.itemsize
        pieces = footprint.chunk.slices
        numels = [piece.numel for piece in pieces]
        gradients: dict[int, int] = {}
        accumulates = self._footprints.training.gradient_accumulation_steps > 1
        if accumulates:
            gradients = {i: self._malloc(numel * itemsize) for i, numel in enumerate(numels)}
        offset, live = self._next, dict[int, int]()
        for segment in compose(footprint.trace, footprint.runs, numels, itemsize):
            for number, size_bytes, ordinal in segment.events:
                block = offset + number
                if size_bytes < 0:
                    self._allocator.free(block)
                    del live[block]
                    continue
                self._allocator.malloc(block, size_bytes)
                live[block] = ordinal
                self._next = max(self._next, block + 1)
        gradients |= {ordinal: block for block, ordinal in live.items() if ordinal >= 0}
        states = self._optimizer(pieces, update, gradients, states)
        for block in live.keys() - gradients.values():
            self._allocator.free(block)
        return states

    def _optimizer(
        self, pieces: Sequence[Slice], update: Update, gradients: dict[int, int], states: list[int]
    ) -> list[int]:
        """Update the slices in turn; returns the blocks of states that stay on the device."""
        staying: list[int] = []
        for position, piece in enumerate(pieces):
            if position not in gradients:
                continue
            trace = self._footprints.update_trace(piece, self._schedule, update)
            blocks = {0: gradients[position]}
            (segment,) = (segment for segment in trace.segments if segment.phase == "optimizer")
            for event in segment.events:
                if event >= 0:
                    blocks[event] = self._malloc(trace.blocks[event].size_bytes)
                else:
                    self._allocator.free(blocks.pop(-1 - event))
            staying.extend(blocks.values())
        if update.leaves:
            for block in states:
                self._allocator.free(block)
        return staying if update.comes else states

    def _malloc(self, size_bytes: int) -> int:
        block = self._next
        self._allocator.malloc(block, size_bytes)
        self._next += 1
        return block
