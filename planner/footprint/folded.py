"""A traced step, folded: of each segment a few numbers instead of its events. Pure.

Between two events whose sizes the planned chunk decides (the gradient of a slice comes or goes, memory that
every copy of a layer shares is freed), all sizes are known from the trace: such a stretch is its highest
moment and its net change. A chunk's footprint is then a sum over a few stretches, and a schedule's is
arithmetic on integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from chunkplan.planner.footprint.compose import births, freed_everywhere
from chunkplan.planner.trace.step_trace import CATEGORIES, LayerRun, StepTrace

Bytes = tuple[int, ...]
"""By category."""
ZERO: Bytes = (0,) * len(CATEGORIES)


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
class Stretch:
    """Events of fixed sizes, and the event that follows them."""

    peak: int
    """Live bytes at the highest moment, relative to the beginning; at least 0."""
    net: int
    peak_by_category: Bytes
    net_by_category: Bytes
    variable: int
    """Index of what comes or goes at the end; −1: nothing does."""
    comes: bool


@dataclass(frozen=True, slots=True)
class FoldedSegment:
    """One segment of the trace."""

    phase: str
    place: int
    work: tuple[tuple[int, int, int], ...]
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True, slots=True)
class SliceUpdate:
    """The update of a slice that happens within the step, just before its gradient is freed."""

    peak: Bytes
    """Highest moment, relative to the beginning of the update."""
    net: Bytes
    """What is left afterwards, the gradient aside."""


@dataclass(frozen=True, slots=True)
class SegmentSummary:
    """What a traced segment and its copies do to the footprint, by category."""

    phase: str
    place: int
    """First real layer in the order of time, or a place outside the layers."""
    num_copies: int
    net: Bytes
    """Change of all copies together."""
    peak: Bytes
    """Live bytes at the highest moment, relative to the beginning of the first copy."""
    work: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Copies:
    """How many layers each traced one stands for, and the first of them."""

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


NO_COPIES = Copies((), ())


@dataclass(frozen=True, slots=True)
class FoldedStep:
    """A trace's segments, folded."""

    segments: tuple[FoldedSegment, ...]
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
            size_bytes = rounded(size_bytes, self.granularity)
            found.append(size_bytes if variable.place < 0 else size_bytes * copies.num[variable.place])
        return found

    def totals(
        self, copies: Copies, sizes: Sequence[int], updates: Sequence[tuple[int, int]] = ()
    ) -> Iterator[tuple[int, int]]:
        """(highest moment relative to the beginning, change) of every segment with its copies, in order of
        time.

        Args:
            copies: of the traced layers.
            sizes: of the variables.
            updates: (highest moment, change) of each traced slice's update, where slices are updated in
                backward.
        """
        variables, num_copies = self.variables, copies.num
        for segment in self.segments:
            live = highest = 0
            for stretch in segment.stretches:
                highest = max(highest, live + stretch.peak)
                live += stretch.net
                index = stretch.variable
                if index < 0:
                    continue
                if stretch.comes:
                    live += sizes[index]
                    continue
                if updates and variables[index].ordinal >= 0:
                    peak, net = updates[variables[index].ordinal]
                    highest = max(highest, live + peak)
                    live += net
                live -= sizes[index]
            if segment.place >= 0 and num_copies[segment.place] > 1:
                if live > 0:
                    highest += (num_copies[segment.place] - 1) * live
                live *= num_copies[segment.place]
            yield highest, live

    def summaries(
        self, copies: Copies, sizes: Sequence[int], updates: Sequence[SliceUpdate] = ()
    ) -> list[SegmentSummary]:
        """Return the totals by category; copies of a repeated layer are one entry."""
        return [self._summary(segment, copies, sizes, updates) for segment in self.segments]

    def _summary(
        self, segment: FoldedSegment, copies: Copies, sizes: Sequence[int], updates: Sequence[SliceUpdate]
    ) -> SegmentSummary:
        live, peak, highest = ZERO, ZERO, 0
        for stretch in segment.stretches:
            total = sum(live)
            if total + stretch.peak > highest:
                highest, peak = total + stretch.peak, added(live, stretch.peak_by_category)
            live = added(live, stretch.net_by_category)
            if stretch.variable < 0:
                continue
            variable = self.variables[stretch.variable]
            if updates and not stretch.comes and variable.ordinal >= 0:
                update = updates[variable.ordinal]
                if sum(live) + sum(update.peak) > highest:
                    highest, peak = sum(live) + sum(update.peak), added(live, update.peak)
                live = added(live, update.net)
            size_bytes = sizes[stretch.variable] if stretch.comes else -sizes[stretch.variable]
            live = tuple(value + size_bytes * (i == variable.category) for i, value in enumerate(live))
        place, num_copies = segment.place, 1
        if place >= 0:
            num_copies = copies.num[place]
            place = copies.first[place] + (num_copies - 1 if segment.phase != "forward" else 0)
        if num_copies > 1:
            if sum(live) > 0:
                peak = tuple(high + (num_copies - 1) * change for high, change in zip(peak, live, strict=True))
            live = tuple(change * num_copies for change in live)
        return SegmentSummary(segment.phase, place, num_copies, live, peak, segment.work)


def fold(trace: StepTrace, granularity: int) -> FoldedStep:
    """Fold a trace.

    Args:
        trace: of any chunk.
        granularity: every block is rounded up to a multiple of this many bytes (512 on CUDA, 1 on the CPU).
    """
    born = births(trace)
    variables: dict[Variable, int] = {}
    segments = []
    for segment in trace.segments:
        shared = freed_everywhere(segment, born)
        stretches: list[Stretch] = []
        fixed: list[tuple[int, int]] = []
        for event in segment.events:
            number = event if event >= 0 else -1 - event
            asked_bytes, category, ordinal = trace.blocks[number]
            place = born[number][1] if shared and event < 0 and born[number] in shared else -1
            if ordinal < 0 and place < 0:
                size_bytes = -(-asked_bytes // granularity) * granularity
                fixed.append((category, size_bytes if event >= 0 else -size_bytes))
                continue
            variable = Variable(asked_bytes, category, ordinal, place)
            index = variables.setdefault(variable, len(variables))
            stretches.append(_stretch(fixed, index, comes=event >= 0))
            fixed = []
        stretches.append(_stretch(fixed, -1, comes=False))
        segments.append(FoldedSegment(segment.phase, segment.place, segment.work, tuple(stretches)))
    return FoldedStep(tuple(segments), tuple(variables), trace.slice_numels, granularity)


def _stretch(fixed: Sequence[tuple[int, int]], variable: int, *, comes: bool) -> Stretch:
    """Return the stretch of changes (category, bytes) and of what comes or goes after them."""
    live, peak = [0] * len(CATEGORIES), ZERO
    total = highest = 0
    for category, size_bytes in fixed:
        live[category] += size_bytes
        total += size_bytes
        if total > highest:
            highest, peak = total, tuple(live)
    return Stretch(highest, total, peak, tuple(live), variable, comes)


def rounded(size_bytes: int, granularity: int) -> int:
    """The size of a block as the device's allocator counts it."""
    return -(-size_bytes // granularity) * granularity


def added(left: Bytes, right: Bytes) -> Bytes:
    """Sum by category."""
    return tuple(a + b for a, b in zip(left, right, strict=True))
