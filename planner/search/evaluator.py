"""Evaluates schedules of one request: footprints of its chunks, peak, time, and whether they fit."""

from __future__ import annotations

import json
from dataclasses import dataclass

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import ResolvedSchedule, TrainingSpec
from chunkplan.planner.calibration.margins import Margin, calibration
from chunkplan.planner.catalog import ModelEntry, find_gpu, find_model, host_threads
from chunkplan.planner.catalog.overheads import Overheads, overheads
from chunkplan.planner.footprint.cpu_process import (
    HOST_DATA_BYTES,
    PEFT_BYTES,
    compiled_kernels_bytes,
    cpu_process_bytes,
)
from chunkplan.planner.footprint.footprint import ChunkFootprint, Footprints
from chunkplan.planner.footprint.reserved import reserved_bytes
from chunkplan.planner.footprint.run_phases import host_phases, run_phases
from chunkplan.planner.paths import cache_dir
from chunkplan.planner.spec import Breakdown, GpuSpec, Peak, PhasePeak, PlanRequest
from chunkplan.planner.trace.store import TraceStore

MAX_MICRO_BATCH_TOKENS = 2**20
_MOST_WARM = 6
"""Models, specs and devices whose traces a process keeps: tens of megabytes each. ``auto`` looks at six
specs."""
_WARM: dict[tuple[str, ...], Footprints] = {}
"""The last ones, the newest at the end."""


@dataclass(frozen=True, slots=True)
class Outline:
    """One schedule, as far as arithmetic goes: everything but what the allocator makes of it."""

    training: TrainingSpec
    schedule: ResolvedSchedule
    chunks: tuple[ChunkFootprint, ...]
    allocated_bytes: int
    """Highest over the cycle."""
    host_bytes: int
    step_seconds: float
    """Mean over a cycle of one update."""
    least_upper_bytes: int
    """The bound if the allocator reserved nothing on top: never above the plan's."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One schedule, computed: every chunk's footprint and the peak over the cycle."""

    training: TrainingSpec
    schedule: ResolvedSchedule
    chunks: tuple[ChunkFootprint, ...]
    peak: Peak
    fits: bool
    step_seconds: float


class Evaluator:
    """Evaluates schedules of one request's model, device and training spec."""

    def __init__(self, request: PlanRequest) -> None:
        _check_work(request.training)
        self.request = request
        self.model: ModelEntry = find_model(request.model)
        found = find_gpu(request.gpu)
        self.margin: Margin = calibration().margin(found)
        self.gpu: GpuSpec = self.margin.timed(found)
        self.overheads: Overheads = overheads(self.gpu)
        usable = self.gpu.memory_bytes - self.overheads.driver_reserved_bytes
        self.capacity_bytes = min(usable, request.memory_limit_bytes or usable)
        self._footprints: dict[str, Footprints] = {}

    def footprints(self, training: TrainingSpec) -> Footprints:
        """Footprints under a spec; specs that differ only in the schedule share them."""
        key = training.model_dump_json(exclude={"schedule"})
        if key not in self._footprints:
            self._footprints[key] = self._warm_footprints(key, training)
        return self._footprints[key]

    def _warm_footprints(self, key: str, training: TrainingSpec) -> Footprints:
        """Those of an earlier request of this process where it asked for the same model, spec and device."""
        device = (self.gpu.model_dump_json(), str(host_threads()))
        whole = (json.dumps(self.model.config, sort_keys=True), key, *device, str(cache_dir()))
        found = _WARM.pop(whole, None)
        if found is None:
            found = Footprints(TraceStore(self.model.config, training, self.gpu.kind), training, self.gpu)
        _WARM[whole] = found
        while len(_WARM) > _MOST_WARM:
            del _WARM[next(iter(_WARM))]
        return found

    def outline(self, training: TrainingSpec, schedule: ResolvedSchedule) -> Outline:
        """Every chunk's footprint, and what follows from it without the allocator."""
        footprints = self.footprints(training)
        chunks = tuple(footprints.of_chunk(chunk, schedule) for chunk in footprints.chunks(schedule.num_chunks))
        seconds = sum(chunk.seconds for chunk in chunks) / len(chunks)
        return self._outline(training, schedule, chunks, max(chunk.peak_bytes for chunk in chunks), seconds)

    def sketch(self, training: TrainingSpec, schedule: ResolvedSchedule) -> Outline:
        """An estimated outline without chunks, to tell many schedules apart quickly."""
        peak_bytes, seconds = self.footprints(training).estimate(schedule)
        return self._outline(training, schedule, (), peak_bytes, seconds)

    def _outline(
        self,
        training: TrainingSpec,
        schedule: ResolvedSchedule,
        chunks: tuple[ChunkFootprint, ...],
        peak_bytes: int,
        seconds: float,
    ) -> Outline:
        footprints, extra = self.footprints(training), self.overheads
        allocated = peak_bytes + extra.workspace_bytes * extra.num_workspaces
        device, host = self._device_and_host(footprints, schedule, allocated, allocated)
        return Outline(
            training=training,
            schedule=schedule,
            chunks=chunks,
            allocated_bytes=allocated,
            host_bytes=host,
            step_seconds=seconds,
            least_upper_bytes=self._bound(device, footprints),
        )

    def least_upper_bytes(self, training: TrainingSpec, schedule: ResolvedSchedule, peak_bytes: int) -> int:
        """The bound if nothing exceeded ``peak_bytes``, and the allocator reserved nothing on top."""
        return self._outline(training, schedule, (), peak_bytes, 0.0).least_upper_bytes

    def evaluate(self, training: TrainingSpec, schedule: ResolvedSchedule) -> Evaluation:
        """Footprints of all chunks, the peak with all its counters, and whether it fits."""
        return self.complete(self.outline(training, schedule))

    def complete(self, outline: Outline) -> Evaluation:
        """The outline of a schedule with what the allocator makes of it."""
        footprints = self.footprints(outline.training)
        peak = self._peak(footprints, outline)
        footprints.store.save()
        fits = peak.upper_bytes <= self.capacity_bytes
        return Evaluation(outline.training, outline.schedule, outline.chunks, peak, fits, outline.step_seconds)

    def _peak(self, footprints: Footprints, outline: Outline) -> Peak:
        chunks, schedule, extra = outline.chunks, outline.schedule, self.overheads
        highest = max(chunks, key=lambda chunk: chunk.peak_bytes)
        moment = max(footprints.moments(highest.chunk, schedule), key=lambda moment: moment.live.total_bytes)
        categories = moment.live.as_dict()
        categories["workspace"] += extra.workspace_bytes * extra.num_workspaces
        breakdown = Breakdown(**categories)
        reserved = allocated = breakdown.total_bytes
        if self.gpu.kind != "cpu":
            reserved = max(reserved_bytes(footprints, chunks, schedule, extra), allocated)
        device, host = self._device_and_host(footprints, schedule, allocated, reserved)
        return Peak(
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            device_bytes=device,
            host_bytes=host,
            upper_bytes=self._bound(device, footprints),
            growth_bytes=self._growth_bytes(footprints),
            phase=moment.phase,
            chunk_index=highest.chunk.index,
            breakdown=breakdown,
        )

    def _bound(self, device_bytes: int, footprints: Footprints) -> int:
        bound = self.margin.bound(device_bytes, footprints.structure.parameter_bytes)
        return bound + self._growth_bytes(footprints)

    def _growth_bytes(self, footprints: Footprints) -> int:
        return compiled_kernels_bytes(footprints.training, self.model.config) if self.gpu.kind == "cpu" else 0

    def _device_and_host(
        self, footprints: Footprints, schedule: ResolvedSchedule, allocated: int, reserved: int
    ) -> tuple[int, int]:
        extra, structure = self.overheads, footprints.structure
        if self.gpu.kind == "cpu":
            process = cpu_process_bytes(
                extra.runtime_bytes,
                footprints.training,
                self.model.config,
                structure,
                allocated,
                footprints.kept_bytes(schedule),
            )
            return process, process
        runtime = self._runtime_bytes(footprints.training)
        return reserved + extra.context_bytes, runtime + max(host_phases(footprints, schedule).values())

    def _runtime_bytes(self, training: TrainingSpec) -> int:
        return self.overheads.runtime_bytes + (0 if training.lora is None else PEFT_BYTES)

    def phases(self, chosen: Evaluation) -> list[PhasePeak]:
        """The highest moments of the run's phases."""
        footprints, extra = self.footprints(chosen.training), self.overheads
        found = run_phases(
            footprints,
            chosen.chunks,
            chosen.schedule,
            workspaces_bytes=extra.workspace_bytes * extra.num_workspaces,
            runtime_bytes=self._runtime_bytes(chosen.training),
        )
        footprints.store.save()
        return found

    def floor_bytes(self, training: TrainingSpec) -> int:
        """Device bytes that no schedule goes below: weights, libraries, context, and the bound's
        fixed part.
        """
        structure, extra = self.footprints(training).structure, self.overheads
        if self.gpu.kind == "cpu":
            return structure.parameter_bytes + extra.runtime_bytes + HOST_DATA_BYTES + self.margin.fixed_bytes
        workspaces = extra.workspace_bytes * extra.num_workspaces
        return structure.parameter_bytes + workspaces + extra.context_bytes + self.margin.fixed_bytes


def _check_work(training: TrainingSpec) -> None:
    """Raises InputError for a micro-batch whose trace would take minutes: the fused loss goes
    block by block.
    """
    if training.seq_len * training.micro_batch_size > MAX_MICRO_BATCH_TOKENS:
        field = "seq_len" if training.seq_len > MAX_MICRO_BATCH_TOKENS else "micro_batch_size"
        raise InputError(f"training.{field}", f"a micro-batch may hold at most {MAX_MICRO_BATCH_TOKENS} tokens")
