"""The highest moments of a run's phases, in and around its steps: from loading the model to exporting it.
Pure.

On the device only steps can be the peak: loading, evaluating, and writing what was trained have no gradients
and save nothing for backward. On the host of a GPU it is often the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence

from chunkplan.engine.spec import Precision, ResolvedSchedule
from chunkplan.engine.stream.chunks import Chunk
from chunkplan.planner.catalog.overheads import FILE_ITEMSIZE
from chunkplan.planner.footprint.footprint import ChunkFootprint, Footprints
from chunkplan.planner.spec import PhasePeak

EXPORT_SHARD_BYTES = 50 * 10**9
"""Weights in host memory at once while a GPU's model is exported: transformers' ``max_shard_size``."""
STEPPING = "step"
"""All phases but those that take more on the host."""


def host_phases(footprints: Footprints, schedule: ResolvedSchedule) -> dict[str, int]:
    """What the host of a GPU holds in each phase, without the process itself.

    Args:
        footprints: of the model under the training spec.
        schedule: decides what the optimizer keeps there between visits.
    """
    structure, training = footprints.structure, footprints.training
    kept = footprints.kept_bytes(schedule)
    largest = footprints.largest_chunk(schedule.num_chunks)
    written = largest.num_parameters * training.trained_precision.itemsize + _staying(footprints, largest, schedule)
    weights = structure.parameter_bytes
    converted = 0 if training.precision is Precision.BF16 else weights
    return {
        "load": FILE_ITEMSIZE * structure.num_parameters + converted,
        STEPPING: kept,
        "checkpoint": kept + written,
        "export": kept + min(weights, EXPORT_SHARD_BYTES),
    }


def run_phases(
    footprints: Footprints,
    chunks: Sequence[ChunkFootprint],
    schedule: ResolvedSchedule,
    *,
    workspaces_bytes: int,
    runtime_bytes: int,
) -> list[PhasePeak]:
    """Every phase's highest moment over the run.

    Args:
        footprints: of the model under the training spec.
        chunks: all of the schedule.
        schedule: decides what stays where between updates.
        workspaces_bytes: of the libraries, on the device from the first product on.
        runtime_bytes: of the process on the host before any model.
    """
    pieces = [chunk.chunk for chunk in chunks]
    host = None if footprints.gpu.kind == "cpu" else host_phases(footprints, schedule)

    def peak(phase: str, allocated_bytes: int, chunk_index: int | None = None) -> PhasePeak:
        host_bytes = None if host is None else runtime_bytes + host.get(phase, host[STEPPING])
        return PhasePeak(phase=phase, allocated_bytes=allocated_bytes, host_bytes=host_bytes, chunk_index=chunk_index)

    steps = []
    for phase in chunks[0].phase_peak_bytes:
        highest = max(chunks, key=lambda chunk: chunk.phase_peak_bytes[phase])
        steps.append(peak(phase, highest.phase_peak_bytes[phase] + workspaces_bytes, highest.chunk.index))
    loaded = footprints.resident(schedule).total_bytes
    switching = loaded + workspaces_bytes
    between = switching + max(_staying(footprints, chunk, schedule) for chunk in pieces)
    return [
        peak("load", loaded),
        *steps,
        peak("switch", switching),
        peak("evaluation", between + footprints.steps.evaluation_bytes),
        peak("checkpoint", between),
        peak("export", switching),
    ]


def _staying(footprints: Footprints, chunk: Chunk, schedule: ResolvedSchedule) -> int:
    """Bytes of the chunk's states that are on the device between two updates of its visit."""
    if schedule.switch_every == 1:
        return 0
    return sum(footprints.updates.states_bytes(piece, schedule) for piece in chunk.slices)
