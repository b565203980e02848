"""A traced step, folded: of each segment a few numbers instead of its events. Pure.

Between two events whose sizes the planned chunk decides (the gradient of a slice comes or goes, memory that
every copy of a layer shares is freed), all sizes are known from the trace: such a stretch is its highest
moment and its net change. A chunk's footprint is then a sum over a few stretches, and a schedule's is
arithmetic on integers.

Everything is there twice: in total bytes, which is quick, and by category. One function adds up both, see
:func:`segment_moments`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic

from chunkplan.engine.arithmetic import round_up
from chunkplan.planner.footprint.by_category import NOTHING, Amount, ByCategory
from chunkplan.planner.trace.layers import Copies, births, freed_everywhere
from chunkplan.planner.trace.step_trace import StepTrace


@dataclass(frozen=True, slots=True)
class Variable:
    """A block whose size the chunk decides: the gradient of a slice, or one that several copies of a layer
    hold.
    """

    size_bytes: int
    """As traced, not rounded."""
    category: int
    ordinal: int
    """Ordinal of the traced slice whose gradient it is; −1: it is none."""
    place: int
    """The layer whose copies hold one each, all freed together; −1: it is a gradient."""


@dataclass(frozen=True, slots=True)
class Stretch(Generic[Amount]):
    """Events of fixed sizes, and the event that follows them."""

    peak: Amount
    """Live bytes at the highest moment, relative to the beginning; at least 0."""
    net: Amount
    variable: int
    """Index of what comes or goes at the end; −1: nothing does."""
    comes: bool
    updated: int
    """Ordinal of the traced slice whose gradient goes at the end; −1: none does."""


@dataclass(frozen=True, slots=True)
class FoldedSegment(Generic[Amount]):
    """One segment of the trace."""

    phase: str
    place: int
    stretches: tuple[Stretch[Amount], ...]


@dataclass(frozen=True, slots=True)
class InBackward(Generic[Amount]):
    """The update of a slice that happens within the step, just before its gradient is freed."""

    peak: Amount
    """Highest moment, relative to the beginning of the update."""
    net: Amount
    """What is left afterwards, the gradient aside."""


@dataclass(frozen=True, slots=True, eq=False)
class FoldedStep:
    """A trace's segments, folded."""

    totals: tuple[FoldedSegment[int], ...]
    by_category: tuple[FoldedSegment[ByCategory], ...]
    variables: tuple[Variable, ...]
    slice_numels: tuple[int, ...]
    granularity: int

    def sizes(self, copies: Copies, slice_numels: Sequence[int], itemsize: int) -> list[int]:
        """What the variables of a chunk take, as its device's allocator counts it.

        Args:
            copies: of the traced layers.
            slice_numels: elements of the chunk's slices that the traced ones stand for.
            itemsize: bytes per element of a gradient.
        """
        found = []
        for variable in self.variables:
            ordinal, size_bytes = variable.ordinal, variable.size_bytes
            if ordinal >= 0:
                size_bytes += (slice_numels[ordinal] - self.slice_numels[ordinal]) * itemsize
            size_bytes = round_up(size_bytes, self.granularity)
            found.append(size_bytes if variable.place < 0 else size_bytes * copies.num[variable.place])
        return found

    def sizes_by_category(self, sizes: Sequence[int]) -> list[ByCategory]:
        """What :meth:`sizes` said, by category."""
        return [ByCategory.of(variable.category, size) for variable, size in zip(self.variables, sizes, strict=True)]


def segment_moments(
    segments: Sequence[FoldedSegment[Amount]],
    copies: Copies,
    sizes: Sequence[Amount],
    nothing: Amount,
    updates: Sequence[InBackward[Amount]] = (),
) -> Iterator[tuple[Amount, Amount]]:
    """(highest moment relative to the beginning, change) of every segment with its copies, in order of time.

    Args:
        segments: of a folded step, in total or by category.
        copies: of the traced layers.
        sizes: of the step's variables.
        nothing: no bytes.
        updates: of each traced slice, where slices are updated in backward.
    """
    for segment in segments:
        live = highest = nothing
        for stretch in segment.stretches:
            highest = max(highest, live + stretch.peak)
            live = live + stretch.net
            if stretch.variable < 0:
                continue
            if stretch.comes:
                live = live + sizes[stretch.variable]
                continue
            if updates and stretch.updated >= 0:
                update = updates[stretch.updated]
                highest = max(highest, live + update.peak)
                live = live + update.net
            live = live - sizes[stretch.variable]
        num_copies = copies.num_of(segment.place)
        if num_copies > 1:
            if live > nothing:
                highest = highest + live * (num_copies - 1)
            live = live * num_copies
        yield highest, live


def fold(trace: StepTrace, granularity: int) -> FoldedStep:
    """Fold a trace.

    Args:
        trace: of any chunk.
        granularity: every block is rounded up to a multiple of this many bytes (512 on CUDA, 1 on the CPU).
    """
    born = births(trace)
    blocks = trace.blocks
    sizes = [round_up(block.size_bytes, granularity) for block in blocks]
    variables: dict[Variable, int] = {}
    by_category = []
    for segment in trace.segments:
        shared = freed_everywhere(segment, born)
        stretches: list[Stretch[ByCategory]] = []
        fixed: list[tuple[int, int]] = []
        for event in segment.events:
            number = event if event >= 0 else -1 - event
            asked_bytes, category, ordinal = blocks[number]
            place = born[number][1] if shared and event < 0 and born[number] in shared else -1
            if ordinal < 0 and place < 0:
                fixed.append((category, sizes[number] if event >= 0 else -sizes[number]))
                continue
            variable = Variable(asked_bytes, category, ordinal, place)
            index = variables.setdefault(variable, len(variables))
            peak, net = _peak_and_net(fixed)
            stretches.append(Stretch(peak, net, index, event >= 0, ordinal if event < 0 else -1))
            fixed = []
        stretches.append(Stretch(*_peak_and_net(fixed), variable=-1, comes=False, updated=-1))
        by_category.append(FoldedSegment(segment.phase, segment.place, tuple(stretches)))
    totals = tuple(map(_in_total, by_category))
    return FoldedStep(totals, tuple(by_category), tuple(variables), trace.slice_numels, granularity)


def _in_total(segment: FoldedSegment[ByCategory]) -> FoldedSegment[int]:
    stretches = (
        Stretch(each.peak.total_bytes, each.net.total_bytes, each.variable, each.comes, each.updated)
        for each in segment.stretches
    )
    return FoldedSegment(segment.phase, segment.place, tuple(stretches))


def _peak_and_net(changes: Sequence[tuple[int, int]]) -> tuple[ByCategory, ByCategory]:
    """Live bytes at the highest moment of changes (category, bytes), and after the last of them."""
    live, peak = list(NOTHING.values), NOTHING
    total = highest = 0
    for category, size_bytes in changes:
        live[category] += size_bytes
        total += size_bytes
        if total > highest:
            highest, peak = total, ByCategory(tuple(live))
    return peak, ByCategory(tuple(live))
