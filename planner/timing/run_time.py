"""From the seconds of a step to those of a run, its energy and its cost. Pure."""

from __future__ import annotations

import math

from chunkplan.engine.spec import ResolvedSchedule, TrainingSpec
from chunkplan.planner.spec import GpuSpec, RunLength, RunTime

_JOULES_PER_KWH = 3.6e6


def run_time(
    step_seconds: float,
    dense_step_seconds: float | None,
    training: TrainingSpec,
    schedule: ResolvedSchedule,
    gpu: GpuSpec,
    length: RunLength | None,
) -> RunTime:
    """The times of a run.

    Args:
        step_seconds: mean over a cycle of one update.
        dense_step_seconds: of one update of all parameters.
        training: decides the tokens of an update.
        schedule: decides the updates of a cycle.
        gpu: its power and rent.
        length: of the run; None: unknown.
    """
    cycle = schedule.num_chunks * schedule.switch_every * step_seconds
    if length is None:
        return RunTime(cycle_seconds=cycle, dense_step_seconds=dense_step_seconds)
    epoch = None
    if length.dataset_tokens is not None:
        epoch = length.dataset_tokens / tokens_per_update(training) * step_seconds
    num_updates = _num_updates(length, training)
    seconds = num_updates * step_seconds
    return RunTime(
        cycle_seconds=cycle,
        dense_step_seconds=dense_step_seconds,
        num_updates=num_updates,
        epoch_seconds=epoch,
        run_seconds=seconds,
        energy_kwh=None if gpu.power_watts is None else gpu.power_watts * seconds / _JOULES_PER_KWH,
        cost_usd=None if gpu.rent_usd_per_hour is None else gpu.rent_usd_per_hour * seconds / 3600,
    )


def tokens_per_update(training: TrainingSpec) -> int:
    """Tokens that one optimizer update sees, padding included."""
    return training.seq_len * training.micro_batch_size * training.gradient_accumulation_steps


def _num_updates(length: RunLength, training: TrainingSpec) -> int:
    if length.max_steps is not None:
        return length.max_steps
    assert length.dataset_tokens is not None
    num_batches = math.ceil(length.dataset_tokens / (training.seq_len * training.micro_batch_size))
    return max(1, math.ceil((length.epochs or 1.0) * num_batches / training.gradient_accumulation_steps))
