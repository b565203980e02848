"""A cycle, event by event: every block that comes and goes, and what it is. Pure but for the trace store.

What :mod:`chunkplan.planner.report.snapshot` shows. Reserved bytes follow from the same events, without going
through each of them (:mod:`chunkplan.planner.footprint.reserved`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from chunkplan.engine.spec import ResolvedSchedule
from chunkplan.engine.stream.chunks import Slice
from chunkplan.planner.catalog.overheads import Overheads
from chunkplan.planner.footprint.compose import ComposedSegment, compose
from chunkplan.planner.footprint.footprint import ChunkFootprint, Footprints
from chunkplan.planner.footprint.replay_programs import rule_events
from chunkplan.planner.footprint.slice_updates import Update, updates_of_visit
from chunkplan.planner.footprint.steps import place_name
from chunkplan.planner.trace.step_trace import CATEGORIES

Label = tuple[str, str, str]
"""(category, place, when): ``("activations", "layer 3", "chunk 0 backward")``."""


class Recorder(Protocol):
    """What is told of every block."""

    def take(self, block: int, size_bytes: int, label: Label) -> None:
        """A block comes."""

    def give(self, block: int) -> None:
        """It goes."""


class CycleEvents:
    """Goes through a cycle."""

    def __init__(self, recorder: Recorder, footprints: Footprints, schedule: ResolvedSchedule) -> None:
        self._recorder = recorder
        self._footprints = footprints
        self._schedule = schedule
        self._next = 0

    def load(self, overheads: Overheads) -> None:
        """Weights and buffers, then the libraries' workspaces."""
        structure = self._footprints.structure
        for info in structure.parameters:
            self._take(info.num_bytes, ("weights", info.name, "load"))
        for _, size_bytes in structure.frozen:
            self._take(size_bytes, ("weights", "frozen weight", "load"))
        self._take(structure.buffer_bytes, ("other", "buffers", "load"))
        if self._schedule.expansion == "factored":
            for size_bytes in self._footprints.factored_bytes():
                self._take(size_bytes, ("optimizer_states", "factored moments", "load"))
        for _ in range(overheads.num_workspaces):
            self._take(overheads.workspace_bytes, ("workspace", "library workspace", "load"))

    def visit(self, footprint: ChunkFootprint) -> None:
        """All kinds of update of one visit, one after another."""
        states: list[int] = []
        for update in updates_of_visit(self._schedule):
            states = self._update(footprint, update, states)

    def _update(self, footprint: ChunkFootprint, update: Update, states: list[int]) -> list[int]:
        training, chunk, step = self._footprints.training, footprint.chunk, footprint.step
        itemsize = training.trained_precision.itemsize
        gradients: dict[int, int] = {}
        if training.gradient_accumulation_steps > 1:
            label = ("gradients", "earlier micro-batches", f"chunk {chunk.index} accumulation")
            gradients = {i: self._take(piece.numel * itemsize, label) for i, piece in enumerate(chunk.slices)}
        live: dict[int, tuple[int, int]] = {}
        staying: list[int] = []
        for segment in compose(step.trace, step.runs, step.traced_numels, itemsize, step.stood_for):
            labels = _labels(footprint, segment)
            for number, size_bytes, ordinal in segment.events:
                if size_bytes >= 0:
                    live[number] = self._take(size_bytes, next(labels)), ordinal
                    continue
                block, _ = live.pop(number)
                if training.update_in_backward and ordinal >= 0:
                    staying += self._update_slice(footprint, chunk.slices[ordinal], update, block)
                else:
                    self._recorder.give(block)
        gradients |= {ordinal: block for block, ordinal in live.values() if ordinal >= 0}
        label = ("optimizer_states", "buffers of passing states", f"chunk {chunk.index} optimizer")
        buffers = [self._take(size, label) for size in self._footprints.updates.buffers(chunk, self._schedule, update)]
        for position, block in sorted(gradients.items()):
            staying += self._update_slice(footprint, chunk.slices[position], update, block)
        rest = [block for block, ordinal in live.values() if ordinal < 0]
        for block in [*buffers, *rest, *(states if update.leaves else [])]:
            self._recorder.give(block)
        return staying if update.comes else states

    def _update_slice(self, footprint: ChunkFootprint, piece: Slice, update: Update, gradient: int) -> list[int]:
        """Update the slice and free its gradient; returns the blocks of states that stay on the device."""
        trace = self._footprints.updates.update_trace(piece, self._schedule, update)
        name = self._footprints.structure.parameters[piece.index].name
        blocks = {0: gradient}
        for event in rule_events(trace):
            if event >= 0:
                block = trace.blocks[event]
                label = (CATEGORIES[block.category], name, f"chunk {footprint.chunk.index} optimizer")
                blocks[event] = self._take(block.size_bytes, label)
            else:
                self._recorder.give(blocks.pop(-1 - event))
        return list(blocks.values())

    def _take(self, size_bytes: int, label: Label) -> int:
        block = self._next
        self._recorder.take(block, size_bytes, label)
        self._next += 1
        return block


def _labels(footprint: ChunkFootprint, segment: ComposedSegment) -> Iterator[Label]:
    """Return what each allocation of the segment is, in their order."""
    place, when = place_name(segment.place), f"chunk {footprint.chunk.index} {segment.phase}"
    for event in segment.traced.events:
        if event >= 0:
            yield CATEGORIES[footprint.step.trace.blocks[event].category], place, when
