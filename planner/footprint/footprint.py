"""The footprint of every chunk's step: peaks by phase, their breakdown, seconds. Pure but for the trace
store.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import ResolvedSchedule, TrainingSpec
from chunkplan.engine.stream.chunks import Chunk, Slice, partition
from chunkplan.planner.footprint.folded import (
    Bytes,
    Copies,
    FoldedStep,
    SegmentSummary,
    SliceUpdate,
    added,
    fold,
)
from chunkplan.planner.footprint.replay_programs import Interned, StepPrograms, UpdateProgram
from chunkplan.planner.footprint.slice_updates import SliceUpdates, Update, updates_of_visit
from chunkplan.planner.spec import GpuSpec
from chunkplan.planner.timing.roofline import rates
from chunkplan.planner.trace.step_trace import CATEGORIES, EMBED, HEAD, LayerRun, StepTrace, layer_runs
from chunkplan.planner.trace.store import TraceStore
from chunkplan.planner.trace.structure import ModelStructure, chunk_roles, stand_ins

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
class ChunkFootprint:
    """One chunk's step in numbers, and what the allocator replay needs."""

    chunk: Chunk
    peak_bytes: int
    """Highest allocated bytes over all kinds of update."""
    phase_peak_bytes: dict[str, int]
    """Highest allocated bytes of each phase over all kinds of update."""
    seconds: float
    """Mean over the updates of a visit."""
    trace: StepTrace
    runs: tuple[LayerRun, ...]


@dataclass(frozen=True, slots=True)
class _Step:
    """Forward and backward of one micro-batch of a chunk, whatever the schedule keeps and moves."""

    trace: StepTrace
    runs: tuple[LayerRun, ...]
    folded: FoldedStep
    copies: Copies
    sizes: list[int]
    """Sizes of the variables, in bytes."""
    traced: tuple[Slice, ...]
    """Slices of the chunk that the trace's stand for, the first of each."""
    phase_peaks: dict[str, int]
    """Relative to the beginning of the step."""
    net: int
    seconds: tuple[float, ...]
    """Seconds of every segment with its copies."""
    total_seconds: float


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
        self.updates = SliceUpdates(
            store,
            training,
            gpu,
            self.structure,
            self.granularity,
            rates(training.compute_precision, gpu),
            self._folded,
        )
        self._steps: dict[tuple[int, int, int, int, bool], _Step] = {}
        self._folds: dict[int, tuple[StepTrace, FoldedStep]] = {}
        self._programs: dict[int, StepPrograms] = {}
        self._kept: dict[ResolvedSchedule, int] = {}
        self.interned: Interned = {}
        """Programs of the allocator's pools that were met."""
        self._update_programs: dict[int, UpdateProgram] = {}
        self._work_seconds: dict[int, list[float]] = {}
        self._resident: dict[str, Bytes] = {}
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
        """The footprint of an update with ``chunk`` active: the highest over the kinds of update
        of a visit.
        """
        step = self._step(chunk, expands=schedule.expansion == "factored")
        phase_peaks: dict[str, int] = {}
        total_seconds = 0.0
        for update in updates_of_visit(schedule):
            peaks, seconds = self._figures(chunk, step, schedule, update)
            total_seconds += seconds * update.count
            for phase, peak in peaks.items():
                phase_peaks[phase] = max(phase_peaks.get(phase, 0), peak)
        seconds = total_seconds / schedule.switch_every
        return ChunkFootprint(chunk, max(phase_peaks.values()), phase_peaks, seconds, step.trace, step.runs)

    def moments(self, chunk: Chunk, schedule: ResolvedSchedule) -> list[Moment]:
        """Every segment's highest moment, of the kind of update whose peak is the highest."""
        step = self._step(chunk, expands=schedule.expansion == "factored")
        highest: list[Moment] = []
        for update in updates_of_visit(schedule):
            moments = self._moments(chunk, step, schedule, update)
            highest = max(highest, moments, key=lambda items: max((m.allocated_bytes for m in items), default=0))
        return highest

    def evaluation_bytes(self) -> int:
        """Highest moment of a held-out batch's forward pass, on top of what is live between two updates."""
        folded = self._folded(self.store.evaluation())
        copies = Copies.of(layer_runs(self.structure.signatures))
        peaks, _ = _phase_peaks(folded, folded.totals(copies, folded.sizes(copies, (), 0)))
        return max(peaks.values())

    def dense_seconds(self, schedule: ResolvedSchedule) -> float:
        """Return the seconds of a dense update: of all parameters, whose states stay on the device."""
        (chunk,) = self.chunks(1)
        dense = schedule.model_copy(update={"num_chunks": 1, "expansion": "none"})
        step = self._step(chunk, expands=False)
        return self._figures(chunk, step, dense, Update(comes=False, leaves=False))[1]

    def _step(self, chunk: Chunk, *, expands: bool) -> _Step:
        first, last = chunk.slices[0], chunk.slices[-1]
        key = (first.index, first.start, last.index, last.stop, expands)
        if key not in self._steps:
            roles = chunk_roles(self.structure, chunk, self.training)
            runs = tuple(layer_runs(roles.layers))
            trace = self.store.step(chunk, roles, expands=expands)
            folded = self._folded(trace)
            copies = Copies.of(runs)
            traced = tuple(chunk.slices[ordinals[0]] for ordinals in stand_ins(self.structure, chunk, runs))
            itemsize = self.training.trained_precision.itemsize
            sizes = folded.sizes(copies, [piece.numel for piece in traced], itemsize)
            seconds = self._segment_seconds(folded, copies)
            phase_peaks, net = _phase_peaks(folded, folded.totals(copies, sizes))
            total = _one_after_another(seconds)
            self._steps[key] = _Step(trace, runs, folded, copies, sizes, traced, phase_peaks, net, seconds, total)
        return self._steps[key]

    def _folded(self, trace: StepTrace) -> FoldedStep:
        """The trace folded, once."""
        known = self._folds.get(id(trace))
        if known is None:
            known = self._folds[id(trace)] = (trace, fold(trace, self.granularity))
        return known[1]

    def _segment_seconds(self, folded: FoldedStep, copies: Copies) -> tuple[float, ...]:
        known = self._work_seconds.get(id(folded))
        if known is None:
            known = self._work_seconds[id(folded)] = [self.updates.seconds(segment.work) for segment in folded.segments]
        return tuple(
            seconds * (copies.num[segment.place] if segment.place >= 0 else 1)
            for seconds, segment in zip(known, folded.segments, strict=True)
        )

    def programs(self, trace: StepTrace) -> StepPrograms:
        """A trace of this model prepared for the replay, once."""
        if id(trace) not in self._programs:
            self._programs[id(trace)] = StepPrograms(trace)
        return self._programs[id(trace)]

    def update_program(self, piece: Slice, schedule: ResolvedSchedule, update: Update) -> UpdateProgram:
        """The update of a slice prepared for the replay, once."""
        trace = self.updates.update_trace(piece, schedule, update)
        if id(trace) not in self._update_programs:
            self._update_programs[id(trace)] = UpdateProgram(trace)
        return self._update_programs[id(trace)]

    def kept_bytes(self, schedule: ResolvedSchedule) -> int:
        """Return what the optimizer keeps in host memory for all chunks between their visits, in bytes."""
        if schedule not in self._kept:
            self._kept[schedule] = self.updates.kept_bytes(self.chunks(schedule.num_chunks), schedule)
        return self._kept[schedule]

    def resident(self, schedule: ResolvedSchedule) -> Bytes:
        """Live bytes by category between two steps."""
        known = self._resident.get(schedule.expansion)
        if known is None:
            live = [0] * len(CATEGORIES)
            live[_WEIGHTS] = sum(map(self.updates.rounded, self.structure.parameter_sizes))
            live[_OTHER] = self.structure.buffer_bytes
            if schedule.expansion == "factored":
                live[_STATES] = sum(map(self.updates.rounded, self.factored_bytes()))
            known = self._resident[schedule.expansion] = tuple(live)
        return known

    def factored_bytes(self) -> list[int]:
        """Sizes of the factored moments of all parameters: an fp32 per row and one per column."""
        infos = self.structure.parameters
        return [4 * length for info in infos for length in (info.numel // info.num_columns, info.num_columns)]

    def estimate(self, schedule: ResolvedSchedule) -> tuple[int, float]:
        """Highest allocated bytes over a cycle and mean seconds of an update, to tell many schedules apart
        quickly.

        Steps are exact, updates of slices estimated (see :meth:`_rough_figures`); schedules that differ only
        in how often a kind of update comes share everything.
        """
        chunks = self.chunks(schedule.num_chunks)
        highest, seconds = 0, 0.0
        for update in updates_of_visit(schedule):
            kept = (self.updates._deciding_a_slice(schedule), schedule.expansion)
            key = (schedule.num_chunks, kept, update.comes, update.leaves)
            if key not in self._estimates:
                expands = schedule.expansion == "factored"
                figures = [
                    self._figures(chunk, self._step(chunk, expands=expands), schedule, update, rough=True)
                    for chunk in chunks
                ]
                peak = max(max(peaks.values()) for peaks, _ in figures)
                self._estimates[key] = peak, sum(each for _, each in figures)
            peak, of_cycle = self._estimates[key]
            highest = max(highest, peak)
            seconds += of_cycle * update.count
        return highest, seconds / schedule.switch_every / len(chunks)

    def _figures(
        self, chunk: Chunk, step: _Step, schedule: ResolvedSchedule, update: Update, *, rough: bool = False
    ) -> tuple[dict[str, int], float]:
        """Peak of each phase, and seconds, of one kind of update: what :meth:`_moments` says, in totals."""
        training = self.training
        live = sum(self._before(chunk, schedule, update))
        phase_peaks, net = step.phase_peaks, step.net
        slices = self.updates.figures(chunk, schedule, update, rough=rough)
        if training.update_in_backward:
            updates = [self._in_backward(piece, schedule, update) for piece in step.traced]
            totals = [(sum(each.peak), sum(each.net)) for each in updates]
            phase_peaks, net = _phase_peaks(step.folded, step.folded.totals(step.copies, step.sizes, totals))
        peaks = {phase: live + peak for phase, peak in phase_peaks.items()}
        live += net
        highest = live
        seconds = self._step_seconds(chunk, step, schedule)
        if self._takes_norms:
            highest = live + max(figures.clip_peak for figures in slices)
            seconds += sum(figures.clip_seconds for figures in slices)
        live += sum(map(self.updates.rounded, self.updates.buffers(chunk, schedule, update)))
        if training.update_in_backward:
            highest = max(highest, live)
        leaves = update.leaves and not update.comes
        for figures in slices:
            if not training.update_in_backward:
                highest = max(highest, live + figures.peak)
                live += figures.net - (figures.states_bytes if leaves else 0)
        seconds += self.updates.seconds_in_a_row((figures.passage for figures in slices), update)
        return peaks | {"optimizer": highest}, seconds

    def _moments(self, chunk: Chunk, step: _Step, schedule: ResolvedSchedule, update: Update) -> list[Moment]:
        """Every segment's highest moment during one kind of update."""
        training = self.training
        live = self._before(chunk, schedule, update)
        in_backward: list[SliceUpdate] = []
        if training.update_in_backward:
            in_backward = [self._in_backward(piece, schedule, update) for piece in step.traced]
        moments, begin = [], 0.0
        summaries = step.folded.summaries(step.copies, step.sizes, in_backward)
        for summary, seconds in zip(summaries, step.seconds, strict=True):
            if summary.phase != "end":
                moments.append(Moment(summary.phase, segment_name(summary), begin, added(live, summary.peak)))
            live = added(live, summary.net)
            begin += seconds
        begin = self._step_seconds(chunk, step, schedule)
        updates = [self.updates.summaries(piece, schedule, update) for piece in chunk.slices]
        if self._takes_norms:
            clips = [added(live, phases["clip"].peak) for phases in updates]
            moments.append(Moment("optimizer", "clip", begin, max(clips, key=sum)))
            begin += sum(self.updates.seconds(phases["clip"].work) for phases in updates)
        live = _more(live, _STATES, sum(map(self.updates.rounded, self.updates.buffers(chunk, schedule, update))))
        for position, (piece, phases) in enumerate(zip(chunk.slices, updates, strict=True)):
            summary = phases["optimizer"]
            if not training.update_in_backward:
                moments.append(Moment("optimizer", f"slice {position}", begin, added(live, summary.peak)))
                live = added(live, summary.net)
                if update.leaves and not update.comes:
                    live = _more(live, _STATES, -self.updates.states_bytes(piece, schedule))
            begin += self.updates.transfer_time(piece, schedule, update, self.updates.seconds(summary.work)).steady
        if training.update_in_backward:
            moments.append(Moment("optimizer", "end", begin, live))
        return moments

    @property
    def _takes_norms(self) -> bool:
        return self.training.max_grad_norm is not None or self.training.scales_loss

    def _before(self, chunk: Chunk, schedule: ResolvedSchedule, update: Update) -> Bytes:
        """Live bytes by category before the last micro-batch of an update."""
        training = self.training
        live = list(self.resident(schedule))
        if not update.comes:
            live[_STATES] += sum(self.updates.states_bytes(piece, schedule) for piece in chunk.slices)
        others = training.gradient_accumulation_steps - 1
        inputs = self.structure.num_inputs
        live[_OTHER] += inputs * others * training.micro_batch_size * training.seq_len * _ID_BYTES
        if others:
            live[_GRADIENTS] += sum(
                self.updates.rounded(p.numel * training.trained_precision.itemsize) for p in chunk.slices
            )
        return tuple(live)

    def _step_seconds(self, chunk: Chunk, step: _Step, schedule: ResolvedSchedule) -> float:
        """Seconds of all micro-batches of an update; the last one expands where the schedule asks for it."""
        others = self.training.gradient_accumulation_steps - 1
        plain = step
        if others and schedule.expansion == "factored":
            plain = self._step(chunk, expands=False)
        return step.total_seconds + others * plain.total_seconds

    def _in_backward(self, piece: Slice, schedule: ResolvedSchedule, update: Update) -> SliceUpdate:
        """What the update of a slice adds to the moment at which its gradient is complete."""
        summary = self.updates.summaries(piece, schedule, update)["optimizer"]
        net = list(summary.net)
        net[_GRADIENTS] = 0
        if update.leaves and not update.comes:
            net[_STATES] -= self.updates.states_bytes(piece, schedule)
        return SliceUpdate(summary.peak, tuple(net))


def place_name(place: int) -> str:
    """``embedding``, ``head`` or ``layer 3``."""
    return {EMBED: "embedding", HEAD: "head"}.get(place, f"layer {place}")


def _phase_peaks(folded: FoldedStep, totals: Iterable[tuple[int, int]]) -> tuple[dict[str, int], int]:
    """Highest moment of each phase relative to the beginning of the step, and the step's change.

    ``loss`` is the end of ``forward``: final norm, head and loss.
    """
    live, peaks = 0, dict[str, int]()
    for segment, (highest, net) in zip(folded.segments, totals, strict=True):
        if segment.phase != "end":
            peaks[segment.phase] = max(peaks.get(segment.phase, 0), live + highest)
        if segment.phase == "forward" and segment.place == HEAD:
            peaks["loss"] = max(peaks.get("loss", 0), live + highest)
        live += net
    return peaks, live


def _one_after_another(seconds: Iterable[float]) -> float:
    """A sum that rounds as a clock that is moved on does; :func:`sum` may round less."""
    total = 0.0
    for each in seconds:
        total += each
    return total


def _more(live: Bytes, category: int, size_bytes: int) -> Bytes:
    return (*live[:category], live[category] + size_bytes, *live[category + 1 :])


def segment_name(summary: SegmentSummary) -> str:
    """The place of a segment, or ``layers 3-9`` in the order of time."""
    if summary.num_copies == 1:
        return place_name(summary.place)
    last = summary.place + (summary.num_copies - 1) * (1 if summary.phase == "forward" else -1)
    return f"layers {summary.place}-{last}"
