"""The footprint of every chunk's step: peaks by phase, their breakdown, seconds. Pure but for the trace
store.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import ResolvedSchedule, TrainingSpec
from chunkplan.engine.stream.chunks import Chunk, Slice, partition
from chunkplan.planner.footprint.by_category import NOTHING, Amount, ByCategory
from chunkplan.planner.footprint.folded import InBackward, segment_moments
from chunkplan.planner.footprint.replay_programs import ReplayPrograms
from chunkplan.planner.footprint.slice_updates import SliceUpdate, SliceUpdates, Update, updates_of_visit
from chunkplan.planner.footprint.steps import Step, Steps, phase_peaks_and_net, segment_name
from chunkplan.planner.spec import GpuSpec
from chunkplan.planner.timing.roofline import rates
from chunkplan.planner.trace.store import TraceStore
from chunkplan.planner.trace.structure import ModelStructure

CUDA_GRANULARITY = 512
MAX_PLANNED_CHUNKS = 4096
"""Bounds the work of one plan; past a few hundred a chunk's own memory is small against everything else."""
_ID_BYTES = 8


@dataclass(frozen=True, slots=True)
class Moment:
    """Live bytes by category at the highest moment of one segment, and when that segment begins."""

    phase: str
    segment: str
    seconds: float
    live: ByCategory


@dataclass(frozen=True, slots=True)
class ChunkFootprint:
    """One chunk's step in numbers, and what the allocator replay needs."""

    chunk: Chunk
    peak_bytes: int
    """Highest allocated bytes over all kinds of update."""
    phase_peak_bytes: dict[str, int]
    """Highest allocated bytes of each phase over all kinds of update."""
    seconds: float
    """Mean over the updates of a visit."""
    step: Step


class Footprints:
    """Computes chunks' footprints for one model, training spec and device.

    Args:
        store: traces of the model under the spec.
        training: the spec; its schedule is given separately.
        gpu: decides granularity and time.
    """

    def __init__(self, store: TraceStore, training: TrainingSpec, gpu: GpuSpec) -> None:
        self.store = store
        self.training = training
        self.gpu = gpu
        self.structure: ModelStructure = store.structure()
        granularity = 1 if gpu.kind == "cpu" else CUDA_GRANULARITY
        achieved = rates(training.compute_precision, gpu)
        self.steps = Steps(store, training, self.structure, granularity, achieved)
        self.updates = SliceUpdates(store, training, gpu, self.structure, granularity, achieved)
        self.programs = ReplayPrograms()
        self._kept: dict[ResolvedSchedule, int] = {}
        self._estimates: dict[tuple[Hashable, ...], tuple[int, float]] = {}
        self._largest: dict[int, Chunk] = {}
        self._partitions: dict[int, list[Chunk]] = {}

    def chunks(self, num_chunks: int) -> list[Chunk]:
        """The stream's partition; raises InputError for more chunks than rows, or than can be planned."""
        if num_chunks > MAX_PLANNED_CHUNKS:
            raise InputError("training.schedule.num_chunks", f"at most {MAX_PLANNED_CHUNKS} chunks can be planned")
        if num_chunks not in self._partitions:
            self._partitions[num_chunks] = partition(self.structure.parameters, num_chunks)
        return self._partitions[num_chunks]

    def largest_chunk(self, num_chunks: int) -> Chunk:
        """The one with most parameters."""
        if num_chunks not in self._largest:
            self._largest[num_chunks] = max(self.chunks(num_chunks), key=lambda chunk: chunk.num_parameters)
        return self._largest[num_chunks]

    def of_chunk(self, chunk: Chunk, schedule: ResolvedSchedule) -> ChunkFootprint:
        """The footprint of a visit of ``chunk``: the highest over the kinds of update that it has."""
        phase_peaks: dict[str, int] = {}
        total_seconds = 0.0
        for update in updates_of_visit(schedule):
            peaks, seconds = self._peaks_and_seconds(chunk, schedule, update)
            total_seconds += seconds * update.count
            for phase, peak in peaks.items():
                phase_peaks[phase] = max(phase_peaks.get(phase, 0), peak)
        seconds = total_seconds / schedule.switch_every
        return ChunkFootprint(chunk, max(phase_peaks.values()), phase_peaks, seconds, self._step(chunk, schedule))

    def moments(self, chunk: Chunk, schedule: ResolvedSchedule) -> list[Moment]:
        """Every segment's highest moment, of the kind of update whose peak is the highest."""
        of_updates = [self._moments(chunk, schedule, update) for update in updates_of_visit(schedule)]
        return max(of_updates, key=lambda moments: max(moment.live.total_bytes for moment in moments))

    def dense_seconds(self, schedule: ResolvedSchedule) -> float:
        """Seconds of a dense update: of all parameters, whose states stay on the device."""
        (chunk,) = self.chunks(1)
        dense = schedule.model_copy(update={"num_chunks": 1, "expansion": "none"})
        return self._peaks_and_seconds(chunk, dense, Update(comes=False, leaves=False))[1]

    def kept_bytes(self, schedule: ResolvedSchedule) -> int:
        """What the optimizer keeps in host memory for all chunks between their visits, in bytes."""
        if schedule not in self._kept:
            self._kept[schedule] = self.updates.kept_bytes(self.chunks(schedule.num_chunks), schedule)
        return self._kept[schedule]

    def resident(self, schedule: ResolvedSchedule) -> ByCategory:
        """Live bytes between two steps."""
        return self._resident + self._factored if schedule.expansion == "factored" else self._resident

    @cached_property
    def _resident(self) -> ByCategory:
        weights = sum(map(self.updates.rounded, self.structure.parameter_sizes))
        return ByCategory.of("weights", weights) + ByCategory.of("other", self.structure.buffer_bytes)

    @cached_property
    def _factored(self) -> ByCategory:
        return ByCategory.of("optimizer_states", sum(map(self.updates.rounded, self.factored_bytes())))

    def factored_bytes(self) -> list[int]:
        """Sizes of the factored moments of all parameters: an fp32 per row and one per column."""
        infos = self.structure.parameters
        return [4 * length for info in infos for length in (info.numel // info.num_columns, info.num_columns)]

    def estimate(self, schedule: ResolvedSchedule) -> tuple[int, float]:
        """Highest allocated bytes over a cycle and mean seconds of an update, to tell many schedules apart
        quickly.

        Steps are exact, updates of slices estimated; schedules that differ only in how often a kind of update
        comes share everything.
        """
        chunks = self.chunks(schedule.num_chunks)
        highest, seconds = 0, 0.0
        deciding = (schedule.num_chunks, self.updates.deciding(schedule), schedule.expansion)
        for update in updates_of_visit(schedule):
            key = (*deciding, update.comes, update.leaves)
            if key not in self._estimates:
                found = [self._peaks_and_seconds(chunk, schedule, update, rough=True) for chunk in chunks]
                peak = max(max(peaks.values()) for peaks, _ in found)
                self._estimates[key] = peak, sum(each for _, each in found)
            peak, of_cycle = self._estimates[key]
            highest = max(highest, peak)
            seconds += of_cycle * update.count
        return highest, seconds / schedule.switch_every / len(chunks)

    def _step(self, chunk: Chunk, schedule: ResolvedSchedule) -> Step:
        return self.steps.of_chunk(chunk, expands=schedule.expansion == "factored")

    def _peaks_and_seconds(
        self, chunk: Chunk, schedule: ResolvedSchedule, update: Update, *, rough: bool = False
    ) -> tuple[dict[str, int], float]:
        """Peak of each phase, and seconds, of one kind of update: what :meth:`_moments` says, in totals."""
        step = self._step(chunk, schedule)
        slices = self.updates.in_total(chunk, schedule, update, rough=rough)
        live = self._before(chunk, schedule, update).total_bytes
        phase_peaks, net = step.phase_peaks, step.net
        if self.training.update_in_backward:
            updates = [
                InBackward(each.peak.total_bytes, each.net.total_bytes)
                for each in self._in_backward(step, schedule, update)
            ]
            moments = segment_moments(step.folded.totals, step.copies, step.sizes, 0, updates)
            phase_peaks, net = phase_peaks_and_net(step.folded, moments)
        peaks = {phase: live + peak for phase, peak in phase_peaks.items()}
        buffers = self._buffers(chunk, schedule, update)
        peaks["optimizer"] = max(high for *_, high in self._after_backward(live + net, slices, buffers, update))
        seconds = self._seconds_to_backward(chunk, step, schedule)
        if self._takes_norms:
            seconds += sum(each.clip_seconds for each in slices)
        return peaks, seconds + self.updates.seconds_in_a_row(slices, update)

    def _moments(self, chunk: Chunk, schedule: ResolvedSchedule, update: Update) -> list[Moment]:
        """Every segment's highest moment during one kind of update."""
        step = self._step(chunk, schedule)
        folded = step.folded
        in_backward = self._in_backward(step, schedule, update) if self.training.update_in_backward else []
        live, begin = self._before(chunk, schedule, update), 0.0
        moments = []
        sizes = folded.sizes_by_category(step.sizes)
        found = segment_moments(folded.by_category, step.copies, sizes, NOTHING, in_backward)
        for segment, seconds, (peak, net) in zip(folded.by_category, step.seconds, found, strict=True):
            if segment.phase != "end":
                moments.append(Moment(segment.phase, segment_name(segment, step.copies), begin, live + peak))
            live += net
            begin += seconds
        begin = self._seconds_to_backward(chunk, step, schedule)
        slices = [self.updates.by_category(piece, schedule, update) for piece in chunk.slices]
        buffers = ByCategory.of("optimizer_states", self._buffers(chunk, schedule, update))
        for name, seconds, high in self._after_backward(live, slices, buffers, update):
            moments.append(Moment("optimizer", name, begin + seconds, high))
        return moments

    def _after_backward(
        self, live: Amount, slices: Sequence[SliceUpdate[Amount]], buffers: Amount, update: Update
    ) -> Iterator[tuple[str, float, Amount]]:
        """(name, seconds since backward ended, live bytes) of what may be the optimizer's highest moment.

        Args:
            live: bytes when backward has ended.
            slices: the updates of the chunk's slices.
            buffers: through which their states pass.
            update: the kind of update.
        """
        begin = 0.0
        if self._takes_norms:
            yield "clip", begin, live + max(each.clip_peak for each in slices)
            begin += sum(each.clip_seconds for each in slices)
        live = live + buffers
        if self.training.update_in_backward:
            yield "end", begin + sum(each.transfer.steady for each in slices), live
            return
        states_leave = update.leaves and not update.comes
        for position, each in enumerate(slices):
            yield f"slice {position}", begin, live + each.peak
            live = live + each.net
            if states_leave:
                live = live - each.states
            begin += each.transfer.steady

    @property
    def _takes_norms(self) -> bool:
        return self.training.max_grad_norm is not None or self.training.scales_loss

    def _buffers(self, chunk: Chunk, schedule: ResolvedSchedule, update: Update) -> int:
        """Bytes of the tensors through which the chunk's states pass."""
        return sum(map(self.updates.rounded, self.updates.buffers(chunk, schedule, update)))

    def _before(self, chunk: Chunk, schedule: ResolvedSchedule, update: Update) -> ByCategory:
        """Live bytes before the last micro-batch of an update."""
        training, live = self.training, self.resident(schedule)
        if not update.comes:
            states = sum(self.updates.states_bytes(piece, schedule) for piece in chunk.slices)
            live += ByCategory.of("optimizer_states", states)
        others = training.gradient_accumulation_steps - 1
        if others:
            inputs = self.structure.num_inputs * others * training.micro_batch_size * training.seq_len * _ID_BYTES
            itemsize = training.trained_precision.itemsize
            gradients = sum(self.updates.rounded(piece.numel * itemsize) for piece in chunk.slices)
            live += ByCategory.of("other", inputs) + ByCategory.of("gradients", gradients)
        return live

    def _seconds_to_backward(self, chunk: Chunk, step: Step, schedule: ResolvedSchedule) -> float:
        """Seconds of all micro-batches of an update; the last one expands where the schedule asks for it."""
        others = self.training.gradient_accumulation_steps - 1
        plain = step
        if others and schedule.expansion == "factored":
            plain = self.steps.of_chunk(chunk, expands=False)
        return step.total_seconds + others * plain.total_seconds

    def _in_backward(self, step: Step, schedule: ResolvedSchedule, update: Update) -> list[InBackward[ByCategory]]:
        """What the update of each traced slice adds to the moment at which its gradient is complete."""
        return [self._slice_in_backward(piece, schedule, update) for piece in step.traced]

    def _slice_in_backward(self, piece: Slice, schedule: ResolvedSchedule, update: Update) -> InBackward[ByCategory]:
        found = self.updates.by_category(piece, schedule, update)
        net = found.net.without("gradients")
        return InBackward(found.peak, net - found.states if update.leaves and not update.comes else net)
