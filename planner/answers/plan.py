"""``plan``: from a request to the footprint, the time, and the verdict. No GPU, no network, no service."""

from __future__ import annotations

import hashlib
import json

from chunkplan.engine.spec import TrainingSpec
from chunkplan.planner.footprint.footprint import ChunkFootprint
from chunkplan.planner.search.alternatives import alternatives
from chunkplan.planner.search.choose import choose
from chunkplan.planner.search.evaluator import Evaluation, Evaluator
from chunkplan.planner.search.front import front
from chunkplan.planner.spec import ChunkPlan, ModelFacts, Plan, PlanRequest, RunTime
from chunkplan.planner.timing.run_time import run_time, tokens_per_update
from chunkplan.planner.version import code_digest, planner_version


def plan(request: PlanRequest) -> Plan:
    """Answer a request: the footprint of its schedule, or of the one that ``auto`` finds.

    Raises:
        InputError: an unknown model or GPU, a config that cannot be built, more chunks than rows, …; names
            the field.
    """
    evaluator = Evaluator(request)
    chosen = choose(evaluator)
    return Plan(
        id=plan_id(request, evaluator),
        planner_version=planner_version(),
        calibration=evaluator.margin.version,
        time_ratio=evaluator.margin.time_ratio,
        request=request,
        fits=chosen.fits,
        capacity_bytes=evaluator.capacity_bytes,
        model=_facts(evaluator, chosen.training),
        peak=chosen.peak,
        chunks=[_chunk_plan(evaluator, chosen, footprint) for footprint in chosen.chunks],
        schedule=chosen.schedule,
        step_seconds=chosen.step_seconds,
        tokens_per_second=tokens_per_update(chosen.training) / chosen.step_seconds,
        time=_time(evaluator, chosen),
        phases=evaluator.phases(chosen),
        alternatives=alternatives(evaluator, chosen),
        pareto=front(evaluator, chosen),
        warnings=_warnings(evaluator, chosen),
    )


def plan_id(request: PlanRequest, evaluator: Evaluator | None = None) -> str:
    """Content address: request, device, model, calibration and planner decide it."""
    evaluator = evaluator or Evaluator(request)
    asked = request.model_dump(mode="json")
    device = evaluator.gpu.model_dump(mode="json")
    versions = [evaluator.margin.version, code_digest()]
    content = [asked, device, evaluator.model.config, *versions]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    return f"plan_{digest[:24]}"


def _time(evaluator: Evaluator, chosen: Evaluation) -> RunTime:
    dense = None
    if chosen.training.lora is None:
        dense = evaluator.footprints(chosen.training).dense_seconds(chosen.schedule)
    training, length = chosen.training, evaluator.request.run
    return run_time(chosen.step_seconds, dense, training, chosen.schedule, evaluator.gpu, length)


def _facts(evaluator: Evaluator, training: TrainingSpec) -> ModelFacts:
    structure = evaluator.footprints(training).structure
    return ModelFacts(
        name=evaluator.model.id,
        architecture=evaluator.model.architecture,
        num_parameters=structure.num_parameters,
        num_trainable_parameters=structure.num_trainable_parameters,
        num_layers=structure.num_layers,
        parameter_bytes=structure.parameter_bytes,
    )


def _chunk_plan(evaluator: Evaluator, chosen: Evaluation, footprint: ChunkFootprint) -> ChunkPlan:
    names = evaluator.footprints(chosen.training).structure.parameters
    pieces = footprint.chunk.slices
    workspaces = evaluator.overheads.workspace_bytes * evaluator.overheads.num_workspaces
    return ChunkPlan(
        index=footprint.chunk.index,
        num_parameters=footprint.chunk.num_parameters,
        first_parameter=names[pieces[0].index].name,
        last_parameter=names[pieces[-1].index].name,
        peak_allocated_bytes=footprint.peak_bytes + workspaces,
        phase_peak_bytes={phase: peak + workspaces for phase, peak in footprint.phase_peak_bytes.items()},
        step_seconds=footprint.seconds,
    )


def _warnings(evaluator: Evaluator, chosen: Evaluation) -> list[str]:
    warnings = []
    host = evaluator.gpu.kind != "cpu" and chosen.schedule.states == "keep"
    if host and chosen.peak.host_bytes > 2**36:
        gib = chosen.peak.host_bytes / 2**30
        warnings.append(f"states: keep needs {gib:.0f} GiB of host memory; 'reset' needs none for states")
    if chosen.peak.growth_bytes:
        mib = chosen.peak.growth_bytes / 2**20
        warnings.append(
            f"the CPU's library compiles a kernel for every number of tokens that an expert gets: the bound has "
            f"{mib:.0f} MiB for them, which precision fp32 does not need"
        )
    if evaluator.gpu.kind == "rocm":
        warnings.append("ROCm devices are planned with CUDA's allocator and kernels: treat the figures as estimates")
    if evaluator.gpu.kind == "mps":
        warnings.append(
            "Apple devices are planned with CUDA's allocator, as an estimate: the engine does not run there, "
            "and host_bytes come from the same memory"
        )
    return warnings
