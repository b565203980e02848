"""The footprint of every chunk's step: peaks by phase, their breakdown, seconds. Pure but for the trace store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.chunks import Chunk, Slice, partition
from engine.errors import InputError
from engine.spec import ScheduleSpec, TrainingSpec
from engine.states import StateLayout, largest_tensors
from planner.cache import TraceStore
from planner.compose import SegmentSummary, SliceUpdate, summarise
from planner.segments import CATEGORIES, EMBED, HEAD, LayerRun, StepTrace, layer_runs
from planner.spec import GpuSpec
from planner.structure import ModelStructure, chunk_roles, stand_ins
from planner.timing import Rates, rates, transfer_seconds

_WEIGHTS, _GRADIENTS = CATEGORIES.index("weights"), CATEGORIES.index("gradients")
_STATES, _OTHER = CATEGORIES.index("optimizer_states"), CATEGORIES.index("other")
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
    by_category: tuple[int, ...]

    @property
    def allocated_bytes(self) -> int:
        """Sum over the categories."""
        return sum(self.by_category)


@dataclass(frozen=True, slots=True)
class Update:
    """One kind of update within a visit: whether the states come with it, whether they leave, how many there are."""

    comes: bool
    leaves: bool
    count: int = 1


@dataclass(frozen=True, slots=True)
class ChunkFootprint:
    """One chunk's step: every segment's highest moment, the time of an update, and what the allocator replay needs."""

    chunk: Chunk
    moments: tuple[Moment, ...]
    """Of the kind of update whose peak is the highest."""
    phase_peak_bytes: dict[str, int]
    """Highest allocated bytes of each phase over all kinds of update."""
    seconds: float
    """Mean over the updates of a visit."""
    trace: StepTrace
    runs: tuple[LayerRun, ...]

    @property
    def peak(self) -> Moment:
        """The highest moment of the step."""
        return max(self.moments, key=lambda moment: moment.allocated_bytes)


def updates_of_visit(schedule: ScheduleSpec) -> list[Update]:
    """The distinct kinds of update of a visit."""
    if schedule.switch_every == 1:
        return [Update(True, True)]
    num_middle = schedule.switch_every - 2
    middle = [Update(False, False, num_middle)] if num_middle else []
    return [Update(True, False), *middle, Update(False, True)]


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
        self.granularity = 1 if gpu.kind == "cpu" else CUDA_GRANULARITY
        self._rates: Rates = rates(training.compute_precision, gpu)

    def chunks(self, num_chunks: int) -> list[Chunk]:
        """The stream's partition; raises InputError for more chunks than rows, or than can be planned."""
        if num_chunks > MAX_PLANNED_CHUNKS:
            raise InputError("training.schedule.num_chunks", f"at most {MAX_PLANNED_CHUNKS} chunks can be planned")
        return partition(self.structure.parameters, num_chunks)

    def of_chunk(self, chunk: Chunk, schedule: ScheduleSpec) -> ChunkFootprint:
        """The footprint of an update with ``chunk`` active: the highest over the kinds of update of a visit."""
        roles = chunk_roles(self.structure, chunk, self.training)
        runs = tuple(layer_runs(roles.layers))
        trace = self.store.step(chunk, roles, expands=schedule.expansion == "factored")
        traced = [chunk.slices[ordinals[0]] for ordinals in stand_ins(self.structure, chunk, runs)]
        numels = [piece.numel for piece in traced]
        sizes = (numels, self.training.trained_precision.itemsize, self.granularity)
        summaries = summarise(trace, runs, *sizes)
        accumulated: list[SegmentSummary] = []
        if schedule.expansion == "factored" and self.training.gradient_accumulation_steps > 1:
            accumulated = summarise(self.store.step(chunk, roles, expands=False), runs, *sizes)
        phase_peaks: dict[str, int] = {}
        highest: list[Moment] = []
        total_seconds = 0.0
        for update in updates_of_visit(schedule):
            if self.training.update_in_backward:
                summaries = summarise(trace, runs, *sizes, self._updates_in_backward(traced, schedule, update))
            moments, seconds = self._moments(chunk, summaries, accumulated or summaries, schedule, update)
            total_seconds += seconds * update.count
            highest = max(highest, moments, key=lambda items: max((m.allocated_bytes for m in items), default=0))
            for moment in moments:
                phase_peaks[moment.phase] = max(phase_peaks.get(moment.phase, 0), moment.allocated_bytes)
        mean_seconds = total_seconds / schedule.switch_every
        return ChunkFootprint(chunk, tuple(highest), phase_peaks, mean_seconds, trace, runs)

    def update_trace(self, piece: Slice, schedule: ScheduleSpec, update: Update) -> StepTrace:
        """The optimizer's work on one slice."""
        return self.store.update(
            piece.numel,
            self._num_columns(piece),
            schedule,
            comes=update.comes,
            leaves=update.leaves,
            is_shared=self._is_shared(update),
        )

    def _is_shared(self, update: Update) -> bool:
        """Do the states of the whole chunk pass through the same buffers? Only where copies run beside updates."""
        return self.gpu.kind != "cpu" and update.comes and update.leaves and not self.training.update_in_backward

    def buffers(self, chunk: Chunk, schedule: ScheduleSpec, update: Update) -> list[int]:
        """Sizes of the tensors through which the chunk's states pass during this kind of update."""
        if not self._is_shared(update):
            return []
        layout = StateLayout.of(self.training, schedule)
        blocks = layout.wanted([(piece.numel, self._num_columns(piece)) for piece in chunk.slices])
        return [tensor.num_bytes for tensor in largest_tensors(blocks).values()] * min(2, len(blocks))

    def _num_columns(self, piece: Slice) -> int:
        return self.structure.parameters[piece.index].num_columns

    def resident(self, schedule: ScheduleSpec) -> list[int]:
        """Live bytes by category between two steps."""
        live = [0] * len(CATEGORIES)
        live[_WEIGHTS] = sum(map(self.rounded, self.structure.parameter_sizes))
        live[_OTHER] = self.structure.buffer_bytes
        if schedule.expansion == "factored":
            live[_STATES] = sum(map(self.rounded, self.factored_bytes()))
        return live

    def factored_bytes(self) -> list[int]:
        """Sizes of the factored moments of all parameters: an fp32 per row and one per column."""
        infos = self.structure.parameters
        return [4 * length for info in infos for length in (info.numel // info.num_columns, info.num_columns)]

    def rounded(self, size_bytes: int) -> int:
        """Size of a block as the device's allocator counts it."""
        return -(-size_bytes // self.granularity) * self.granularity

    def states_bytes(self, piece: Slice, schedule: ScheduleSpec) -> int:
        """What the optimizer keeps on the device for a slice."""
        layout = StateLayout.of(self.training, schedule)
        return sum(map(self.rounded, layout.device_bytes(piece.numel, self._num_columns(piece))))

    def host_bytes(self, piece: Slice, schedule: ScheduleSpec) -> int:
        """What the optimizer keeps in host memory for a slice between visits."""
        return StateLayout.of(self.training, schedule).host_bytes(piece.numel, self._num_columns(piece))

    def _moments(
        self,
        chunk: Chunk,
        summaries: Sequence[SegmentSummary],
        accumulated: Sequence[SegmentSummary],
        schedule: ScheduleSpec,
        update: Update,
    ) -> tuple[list[Moment], float]:
        training = self.training
        live = self.resident(schedule)
        if not update.comes:
            live[_STATES] += sum(self.states_bytes(piece, schedule) for piece in chunk.slices)
        others = training.gradient_accumulation_steps - 1
        inputs = self.structure.num_inputs
        live[_OTHER] += inputs * others * training.micro_batch_size * training.seq_len * _ID_BYTES
        if others:
            live[_GRADIENTS] += sum(self.rounded(p.numel * training.trained_precision.itemsize) for p in chunk.slices)
        moments, seconds = [], 0.0
        for summary in summaries:
            at_peak = tuple(a + b for a, b in zip(live, summary.peak, strict=True))
            if summary.phase != "end":
                moments.append(Moment(summary.phase, segment_name(summary), seconds, at_peak))
            live = [a + b for a, b in zip(live, summary.net, strict=True)]
            seconds += self._seconds(summary.work) * summary.num_copies
        seconds += others * sum(self._seconds(summary.work) * summary.num_copies for summary in accumulated)
        updates = [self._update(piece, schedule, update) for piece in chunk.slices]
        if training.max_grad_norm is not None or training.scales_loss:  # both take the norm of every gradient
            clips = [tuple(a + b for a, b in zip(live, phases["clip"].peak, strict=True)) for phases in updates]
            moments.append(Moment("optimizer", "clip", seconds, max(clips, key=sum)))
            seconds += sum(self._seconds(phases["clip"].work) for phases in updates)
        live[_STATES] += sum(map(self.rounded, self.buffers(chunk, schedule, update)))
        for position, (piece, phases) in enumerate(zip(chunk.slices, updates, strict=True)):
            summary = phases["optimizer"]
            if not training.update_in_backward:
                at_peak = tuple(a + b for a, b in zip(live, summary.peak, strict=True))
                moments.append(Moment("optimizer", f"slice {position}", seconds, at_peak))
                live = [a + b for a, b in zip(live, summary.net, strict=True)]
                if update.leaves and not update.comes:
                    live[_STATES] -= self.states_bytes(piece, schedule)
            seconds += self._seconds(summary.work)
            if self.gpu.kind != "cpu":
                at_home = self.host_bytes(piece, schedule)
                # What passes through comes and leaves at the same time, one block after the other.
                num_ways = 1 if self._is_shared(update) else update.comes + update.leaves
                seconds += num_ways * transfer_seconds(at_home, self.gpu)
        if training.update_in_backward:
            moments.append(Moment("optimizer", "end", seconds, tuple(live)))
        return moments, seconds

    def _updates_in_backward(
        self, pieces: Sequence[Slice], schedule: ScheduleSpec, update: Update
    ) -> list[SliceUpdate]:
        """What the update of each slice adds to the moment at which its gradient is complete."""
        found = []
        for piece in pieces:
            summary = self._update(piece, schedule, update)["optimizer"]
            net = list(summary.net)
            net[_GRADIENTS] = 0
            if update.leaves and not update.comes:
                net[_STATES] -= self.states_bytes(piece, schedule)
            found.append(SliceUpdate(summary.peak, tuple(net)))
        return found

    def _update(self, piece: Slice, schedule: ScheduleSpec, update: Update) -> dict[str, SegmentSummary]:
        trace = self.update_trace(piece, schedule, update)
        return {summary.phase: summary for summary in summarise(trace, (), (piece.numel,), 0, self.granularity)}

    def _seconds(self, work: Sequence[tuple[int, int, int]]) -> float:
        return sum(self._rates.op_seconds(flops, moved) * count for flops, moved, count in work)


def place_name(place: int) -> str:
    """``embedding``, ``head`` or ``layer 3``."""
    return {EMBED: "embedding", HEAD: "head"}.get(place, f"layer {place}")


def segment_name(summary: SegmentSummary) -> str:
    """The place of a segment, or ``layers 3-9`` in the order of time."""
    if summary.num_copies == 1:
        return place_name(summary.place)
    last = summary.place + (summary.num_copies - 1) * (1 if summary.phase == "forward" else -1)
    return f"layers {summary.place}-{last}"
