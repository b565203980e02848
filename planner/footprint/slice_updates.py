"""Updates of single slices: what they hold, how long they take, and what their states' way adds. Pure but for
traces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic

from chunkplan.engine.arithmetic import ceil_div, round_up
from chunkplan.engine.optimizer.state_layout import BLOCK_NUMEL, StateLayout, StateTensor, largest_tensors
from chunkplan.engine.spec import Optimizer, ResolvedSchedule, TrainingSpec
from chunkplan.engine.stream.chunks import Chunk, Slice
from chunkplan.planner.footprint.by_category import NOTHING, Amount, ByCategory
from chunkplan.planner.footprint.folded import fold, segment_moments
from chunkplan.planner.spec import GpuSpec
from chunkplan.planner.timing.roofline import Rates
from chunkplan.planner.timing.transfers import TransferTime, transfer_seconds, update_beside_copies
from chunkplan.planner.trace.layers import NO_COPIES
from chunkplan.planner.trace.step_trace import StepTrace
from chunkplan.planner.trace.store import TraceStore, deciding_an_update
from chunkplan.planner.trace.structure import ModelStructure


@dataclass(frozen=True, slots=True)
class Update:
    """One kind of update within a visit: whether the states come with it, whether they leave, how many there
    are.
    """

    comes: bool
    leaves: bool
    count: int = 1


@dataclass(frozen=True, slots=True)
class SliceUpdate(Generic[Amount]):
    """The update of one slice: highest moments relative to its beginning, its change, its seconds."""

    clip_peak: Amount
    peak: Amount
    net: Amount
    states: Amount
    """On the device."""
    clip_seconds: float
    seconds: float
    """Seconds of the update alone."""
    transfer: TransferTime
    """Time of the update with the states' way to the device and back."""


def updates_of_visit(schedule: ResolvedSchedule) -> list[Update]:
    """The distinct kinds of update of a visit."""
    if schedule.switch_every == 1:
        return [Update(True, True)]
    num_middle = schedule.switch_every - 2
    middle = [Update(False, False, num_middle)] if num_middle else []
    return [Update(True, False), *middle, Update(False, True)]


class SliceUpdates:
    """Computes the updates of slices for one model, training spec and device.

    Args:
        store: traces of the model under the spec.
        training: the spec; its schedule is given separately.
        gpu: decides granularity and time.
        structure: the model's.
        granularity: every block is rounded up to a multiple of this many bytes.
        rates: what the device achieves.
    """

    def __init__(
        self,
        store: TraceStore,
        training: TrainingSpec,
        gpu: GpuSpec,
        structure: ModelStructure,
        granularity: int,
        rates: Rates,
    ) -> None:
        self.store, self.training, self.gpu, self.structure = store, training, gpu, structure
        self.granularity, self._rates = granularity, rates
        self._columns = [info.num_columns for info in structure.parameters]
        self._by_category: dict[StepTrace, tuple[ByCategory, ByCategory, ByCategory]] = {}
        self._totals: dict[tuple[Hashable, ...], dict[tuple[int, int], SliceUpdate[int]]] = {}
        self._blocks: dict[tuple[int, int, StateLayout], list[dict[str, StateTensor]]] = {}
        self._states: dict[tuple[int, int, str], tuple[int, int]] = {}
        self._deciding: dict[ResolvedSchedule, str] = {}

    def update_trace(self, piece: Slice, schedule: ResolvedSchedule, update: Update) -> StepTrace:
        """The optimizer's work on one slice."""
        return self.store.update(
            piece.numel,
            self._num_columns(piece),
            schedule,
            comes=update.comes,
            leaves=update.leaves,
            is_shared=self.is_shared(update),
        )

    def is_shared(self, update: Update) -> bool:
        """Do the states of the whole chunk pass through the same buffers? Only where copies run beside
        updates.
        """
        return self.gpu.kind != "cpu" and update.comes and update.leaves and not self.training.update_in_backward

    def buffers(self, chunk: Chunk, schedule: ResolvedSchedule, update: Update) -> list[int]:
        """Sizes of the tensors through which the chunk's states pass during this kind of update."""
        if not self.is_shared(update):
            return []
        blocks = [block for piece in chunk.slices for block in self._largest_blocks(piece, schedule)]
        return [tensor.num_bytes for tensor in largest_tensors(blocks).values()] * min(2, len(blocks))

    def _largest_blocks(self, piece: Slice, schedule: ResolvedSchedule) -> list[dict[str, StateTensor]]:
        """States of the slice's first two blocks: none is larger, and more than two are not there at once."""
        layout = StateLayout.of(self.training, schedule)
        key = (piece.numel, self._num_columns(piece), layout)
        if key not in self._blocks:
            self._blocks[key] = layout.wanted([key[:2]])[:2]
        return self._blocks[key]

    def kept_bytes(self, chunks: Iterable[Chunk], schedule: ResolvedSchedule) -> int:
        """Return what the optimizer keeps in host memory for chunks between their visits, in bytes."""
        layout = StateLayout.of(self.training, schedule)
        shapes = ((piece.numel, self._num_columns(piece)) for chunk in chunks for piece in chunk.slices)
        return sum(layout.host_bytes(*shape) * count for shape, count in Counter(shapes).items())

    def deciding(self, schedule: ResolvedSchedule) -> str:
        """Return what of a schedule decides the update of a slice; see :func:`deciding_an_update`."""
        if schedule not in self._deciding:
            self._deciding[schedule] = deciding_an_update(schedule)
        return self._deciding[schedule]

    def _num_columns(self, piece: Slice) -> int:
        return self._columns[piece.index]

    def rounded(self, size_bytes: int) -> int:
        """Size of a block as the device's allocator counts it."""
        return round_up(size_bytes, self.granularity)

    def states_bytes(self, piece: Slice, schedule: ResolvedSchedule) -> int:
        """What the optimizer keeps on the device for a slice."""
        return self._states_bytes(piece, schedule)[0]

    def host_bytes(self, piece: Slice, schedule: ResolvedSchedule) -> int:
        """What the optimizer keeps in host memory for a slice between visits."""
        return self._states_bytes(piece, schedule)[1]

    def _states_bytes(self, piece: Slice, schedule: ResolvedSchedule) -> tuple[int, int]:
        """On the device, and on the host between visits; known for slices of one size and width."""
        key = (piece.numel, self._num_columns(piece), self.deciding(schedule))
        if key not in self._states:
            layout = StateLayout.of(self.training, schedule)
            on_device = sum(map(self.rounded, layout.device_bytes(*key[:2])))
            self._states[key] = on_device, layout.host_bytes(*key[:2])
        return self._states[key]

    def by_category(self, piece: Slice, schedule: ResolvedSchedule, update: Update) -> SliceUpdate[ByCategory]:
        """The update of a slice, by category."""
        trace = self.update_trace(piece, schedule, update)
        clip, rule = (next(each for each in trace.segments if each.phase == phase) for phase in ("clip", "optimizer"))
        if trace not in self._by_category:
            folded = fold(trace, self.granularity).by_category
            moments = segment_moments(folded, NO_COPIES, (), NOTHING)
            phases = {segment.phase: found for segment, found in zip(folded, moments, strict=True)}
            self._by_category[trace] = (phases["clip"][0], *phases["optimizer"])
        clip_peak, peak, net = self._by_category[trace]
        seconds = self._rates.seconds(rule.work)
        return SliceUpdate(
            clip_peak=clip_peak,
            peak=peak,
            net=net,
            states=ByCategory.of("optimizer_states", self.states_bytes(piece, schedule)),
            clip_seconds=self._rates.seconds(clip.work),
            seconds=seconds,
            transfer=self._transfer_time(piece, schedule, update, seconds),
        )

    def in_total(
        self, chunk: Chunk, schedule: ResolvedSchedule, update: Update, *, rough: bool = False
    ) -> list[SliceUpdate[int]]:
        """The updates of the chunk's slices, which are equal for slices of one size and width.

        Args:
            chunk: the active one.
            schedule: decides what is kept and moved.
            update: the kind of update.
            rough: estimate most from a few that are traced, see :meth:`_estimated`.
        """
        known = self._totals.setdefault((self.deciding(schedule), update.comes, update.leaves, rough), {})
        total_of = self._estimated if rough else self._total
        found = []
        for piece in chunk.slices:
            key = (piece.stop - piece.start, self._columns[piece.index])
            total = known.get(key)
            if total is None:
                total = known[key] = total_of(piece, schedule, update)
            found.append(total)
        return found

    def _total(self, piece: Slice, schedule: ResolvedSchedule, update: Update) -> SliceUpdate[int]:
        found = self.by_category(piece, schedule, update)
        return SliceUpdate(
            clip_peak=found.clip_peak.total_bytes,
            peak=found.peak.total_bytes,
            net=found.net.total_bytes,
            states=found.states.total_bytes,
            clip_seconds=found.clip_seconds,
            seconds=found.seconds,
            transfer=found.transfer,
        )

    def _estimated(self, piece: Slice, schedule: ResolvedSchedule, update: Update) -> SliceUpdate[int]:
        """Estimate a slice's update from a few sizes that are traced; its states follow from their layout.

        Stands for the slice: one or two full blocks; below a block the next power of two, whose time is
        launches.
        """
        if self.training.optimizer is Optimizer.ADAFACTOR or self.training.update_in_backward:
            return self._total(piece, schedule, update)
        is_small = piece.numel < BLOCK_NUMEL
        num_blocks = min(2, ceil_div(piece.numel, BLOCK_NUMEL))
        numel = 1 << (piece.numel - 1).bit_length() if is_small else num_blocks * BLOCK_NUMEL
        typical = Slice(piece.index, 0, numel)
        (traced,) = self.in_total(Chunk(0, (typical,)), schedule, update)
        share = 1.0 if is_small else piece.numel / numel
        states_bytes = self.states_bytes(piece, schedule)
        stays = states_bytes - traced.states if update.comes and not update.leaves else 0
        itemsize = self.training.trained_precision.itemsize
        smaller = self.rounded(typical.numel * itemsize) - self.rounded(piece.numel * itemsize)
        return SliceUpdate(
            clip_peak=traced.clip_peak,
            peak=traced.peak + max(stays, 0),
            net=traced.net + stays + smaller,
            states=states_bytes,
            clip_seconds=traced.clip_seconds * share,
            seconds=traced.seconds * share,
            transfer=self._transfer_time(piece, schedule, update, traced.seconds * share),
        )

    def _transfer_time(self, piece: Slice, schedule: ResolvedSchedule, update: Update, seconds: float) -> TransferTime:
        """A slice's update of so many seconds, with what its states' way to the device and back
        adds to it.
        """
        if self.gpu.kind == "cpu":
            return TransferTime(seconds, 0.0)  # copies are part of the traced work there
        one_way = transfer_seconds(self.host_bytes(piece, schedule), self.gpu)
        num_blocks = len(StateLayout.of(self.training, schedule).blocks(piece.numel, self._num_columns(piece)))
        bring, send = one_way * update.comes, one_way * update.leaves
        return update_beside_copies(seconds, bring, send, num_blocks, takes_turns=update.comes and update.leaves)

    def seconds_in_a_row(self, updates: Sequence[SliceUpdate[int]], update: Update) -> float:
        """Seconds of slices in a row; where they share their buffers there is no pause between them."""
        edges = [each.transfer.edges for each in updates]
        return sum(each.transfer.steady for each in updates) + (max(edges) if self.is_shared(update) else sum(edges))
