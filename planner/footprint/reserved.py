"""Reserved memory: what the simulated CUDA caching allocator makes of a cycle. Pure but for the trace store.

The same as an event-by-event walk (:mod:`chunkplan.planner.footprint.block_events`) says, to the byte, but a
segment of a step is simulated only in states of the allocator that were not met before, and without what it
takes and gives back in one go, where a free extent has room for all of that.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from chunkplan.engine.spec import ResolvedSchedule
from chunkplan.engine.stream.chunks import Slice
from chunkplan.engine.stream.schedule import Schedule
from chunkplan.planner.allocator.pool import Pool
from chunkplan.planner.catalog.overheads import Overheads
from chunkplan.planner.footprint.compose import CompositionError
from chunkplan.planner.footprint.footprint import ChunkFootprint, Footprints
from chunkplan.planner.footprint.replay_programs import (
    OTHER_NAMES,
    Ops,
    UpdateProgram,
    base_of,
    block_identity,
    rule_events,
)
from chunkplan.planner.footprint.slice_updates import Update, updates_of_visit


def reserved_bytes(
    footprints: Footprints, chunks: Iterable[ChunkFootprint], schedule: ResolvedSchedule, overheads: Overheads
) -> int:
    """Highest reserved bytes over one cycle in the schedule's order, weights and library
    workspaces included.
    """
    replay = Replay(footprints, schedule)
    replay.load(overheads)
    by_index = {footprint.chunk.index: footprint for footprint in chunks}
    for index in Schedule(len(by_index), schedule.order, 1).cycle_order(0):
        replay.visit(by_index[index])
    return replay.reserved_bytes


class Replay:
    """Feeds both pools with a cycle."""

    def __init__(self, footprints: Footprints, schedule: ResolvedSchedule) -> None:
        self._footprints = footprints
        self._schedule = schedule
        self._itemsize = footprints.training.trained_precision.itemsize
        self._pools = (Pool(is_small=False), Pool(is_small=True))
        self._next_name = OTHER_NAMES

    @property
    def num_simulated(self) -> int:
        """Operations that were not known from an equal state."""
        return sum(pool.num_simulated for pool in self._pools)

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all segments now: without a limit none is given back."""
        return sum(pool.reserved_bytes for pool in self._pools)

    def load(self, overheads: Overheads) -> None:
        """Weights and buffers, then the libraries' workspaces: they stay, and are never named again."""
        structure = self._footprints.structure
        sizes = [*structure.parameter_sizes, structure.buffer_bytes]
        if self._schedule.expansion == "factored":
            sizes += self._footprints.factored_bytes()
        ops = Ops()
        for number, size_bytes in enumerate(sizes + [overheads.workspace_bytes] * overheads.num_workspaces):
            ops.take(OTHER_NAMES - number, size_bytes)
        self._run(ops, -1)
        for pool in self._pools:
            pool.settle()

    def visit(self, footprint: ChunkFootprint) -> None:
        """All kinds of update of one visit, one after another."""
        states: set[int] = set()
        self._next_name = OTHER_NAMES - len(footprint.chunk.slices)
        for update in updates_of_visit(self._schedule):
            staying = self._update(footprint, update)
            states = staying if update.comes else states
            for pool in self._pools:
                pool.clear(set() if update.leaves else states)

    def _update(self, footprint: ChunkFootprint, update: Update) -> set[int]:
        """One update; returns the names of states that came to stay."""
        pieces, training = footprint.chunk.slices, self._footprints.training
        gradients: dict[int, tuple[int, int]] = {}
        """(name, size in bytes) by ordinal of the slice."""
        if training.gradient_accumulation_steps > 1:
            ops = Ops()
            for ordinal, piece in enumerate(pieces):
                gradients[ordinal] = OTHER_NAMES - ordinal, piece.numel * self._itemsize
                ops.take(*gradients[ordinal])
            self._run(ops, -1)
        staying: set[int] = set()
        self._step(footprint, update, gradients, staying)
        buffers = Ops()
        for size_bytes in self._footprints.updates.buffers(footprint.chunk, self._schedule, update):
            buffers.take(self._name(), size_bytes)
        self._run(buffers)
        return staying | self._updates(footprint, update, gradients)

    def _updates(self, footprint: ChunkFootprint, update: Update, gradients: dict[int, tuple[int, int]]) -> set[int]:
        """The updates of all slices, one after another; returns the names of states that came to stay."""
        staying: set[int] = set()
        updates: list[tuple[UpdateProgram, int, int]] = []
        for ordinal, (gradient, _) in sorted(gradients.items()):
            program = self._update_program(footprint.chunk.slices[ordinal], update)
            updates.append((program, self._next_name, gradient))
            staying.update(self._next_name - number for number in program.staying)
            self._next_name -= program.num_blocks
        for is_small, pool in enumerate(self._pools):
            of_slices = (
                program.operations(is_small=bool(is_small), first=first, gradient=gradient)
                for program, first, gradient in updates
            )
            pool.run_unrecorded(list(chain.from_iterable(of_slices)))
        return staying

    def _step(
        self, footprint: ChunkFootprint, update: Update, gradients: dict[int, tuple[int, int]], staying: set[int]
    ) -> None:
        """Forward and backward; adds the gradients that are left to ``gradients``."""
        pieces, step = footprint.chunk.slices, footprint.step
        programs = self._footprints.programs.step(step.trace)
        copies, slices, numels = step.copies, step.stood_for, step.traced_numels
        came: dict[tuple[int, int], int] = {}
        in_backward = self._footprints.training.update_in_backward
        for index, segment in enumerate(step.trace.segments):
            first = base_of(segment.place, copies)
            num = copies.num_of(segment.place)
            for copy in range(num) if segment.phase == "forward" else reversed(range(num)):

                def updated(ops: Ops, name: int, size_bytes: int, traced: int, copy: int = copy) -> None:
                    piece = pieces[slices[traced][copy if len(slices[traced]) > 1 else 0]]
                    staying.update(self._add_update(ops, piece, update, name, size_bytes))

                ops = programs.segment(index, copies, numels, self._itemsize, updated if in_backward else None)
                self._run(ops, first + copy)
                for name, traced in ops.gradients:
                    stood_for = slices[traced]
                    came[block_identity(name, first + copy)] = stood_for[copy if len(stood_for) > 1 else 0]
        for pool in self._pools:
            for name in pool.names():
                ordinal = came.get(block_identity(name, pool.base), -1)
                if ordinal >= 0:
                    gradients[ordinal] = name, pieces[ordinal].numel * self._itemsize

    def _add_update(self, ops: Ops, piece: Slice, update: Update, gradient: int, size_bytes: int) -> set[int]:
        """The update of a slice, which frees its gradient; returns the names of states that stay on the
        device.
        """
        trace = self._footprints.updates.update_trace(piece, self._schedule, update)
        blocks = {0: (gradient, size_bytes)}
        for event in rule_events(trace):
            if event >= 0:
                blocks[event] = self._name(), trace.blocks[event].size_bytes
                ops.take(*blocks[event])
            else:
                ops.give(*blocks.pop(-1 - event))
        return {name for name, _ in blocks.values()}

    def _update_program(self, piece: Slice, update: Update) -> UpdateProgram:
        return self._footprints.programs.update(self._footprints.updates.update_trace(piece, self._schedule, update))

    def _run(self, ops: Ops, base: int | None = None) -> None:
        for pool, program in zip(self._pools, ops.programs(self._footprints.programs.interned), strict=True):
            if program is None:
                continue
            try:
                pool.run(program, pool.base if base is None else base)
            except KeyError as error:
                raise CompositionError(f"an unknown block is freed at layer {base}") from error

    def _name(self) -> int:
        self._next_name -= 1
        return self._next_name
