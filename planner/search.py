"""Which schedule to take: the request's, or the one that ``auto`` finds; and the nearest one when it does not fit."""

from __future__ import annotations

from collections.abc import Iterator

from engine.spec import ScheduleSpec, TrainingSpec, default_schedule
from planner.planning import Evaluation, Planner
from planner.spec import Alternative

MAX_CHUNKS = 512
"""Finer schedules are not proposed: past this the chunk's own memory is small against everything else."""
AUTO_CHUNKS = 64
"""``auto`` goes no finer while anything fits: a cycle of more updates reaches each parameter too rarely."""

_WORTHWHILE = 0.95
"""Twice as many chunks must bring the step below this share of its time."""


def choose(planner: Planner) -> Evaluation:
    """The requested schedule, evaluated; for ``auto`` the fastest that fits, or the smallest peak when none does.

    More chunks make an update cheaper, but with every doubling by less: the search ends where it gains under 5 %.
    """
    training = planner.request.training
    if training.schedule != "auto":
        return planner.evaluate(training, training.schedule)
    if training.method != "chunkft":
        return planner.evaluate(training, default_schedule(training.optimizer, 1))
    if planner.floor_bytes(training) > planner.capacity_bytes:
        return planner.evaluate(training, _with_chunks(planner, default_schedule(training.optimizer, 1), 64))
    best: Evaluation | None = None
    for schedule in _schedules(planner, default_schedule(training.optimizer, 1)):
        candidate = planner.evaluate(training, schedule)
        if best is not None and best.fits and not _is_worthwhile(candidate, best):
            return best
        if best is None or candidate.fits or candidate.peak.upper_bytes < best.peak.upper_bytes:
            best = candidate
    assert best is not None
    return best


def _is_worthwhile(finer: Evaluation, best: Evaluation) -> bool:
    return finer.schedule.num_chunks <= AUTO_CHUNKS and finer.step_seconds <= _WORTHWHILE * best.step_seconds


def alternatives(planner: Planner, chosen: Evaluation) -> list[Alternative]:
    """When the chosen schedule does not fit: the nearest that does, or the smallest there is and how much it lacks."""
    if chosen.fits:
        return []
    floor = planner.floor_bytes(chosen.training)
    if floor > planner.capacity_bytes:
        missing = floor - planner.capacity_bytes
        why = (
            "no schedule with resident weights fits: weights, libraries and context alone need "
            f"{floor} bytes, {missing} more than the device has"
        )
        return [_alternative(chosen, why)]
    smallest = chosen
    for training, schedule, change in _relaxations(planner, chosen):
        candidate = planner.evaluate(training, schedule)
        if candidate.fits:
            return [_alternative(candidate, f"nearest that fits: {change}")]
        if candidate.peak.upper_bytes < smallest.peak.upper_bytes:
            smallest = candidate
    missing = smallest.peak.upper_bytes - planner.capacity_bytes
    return [_alternative(smallest, f"no schedule that was tried fits: the smallest lacks {missing} bytes")]


def _relaxations(planner: Planner, chosen: Evaluation) -> Iterator[tuple[TrainingSpec, ScheduleSpec, str]]:
    """Ways to need less memory, the least intrusive first: chunks, checkpointing and fused loss, the batch."""
    training, schedule = chosen.training, chosen.schedule
    if training.method == "chunkft":
        for finer in _schedules(planner, schedule):
            if finer.num_chunks > schedule.num_chunks:
                yield training, finer, f"{finer.num_chunks} chunks instead of {schedule.num_chunks}"
    lean = training.model_copy(update={"activation_checkpointing": "full", "loss": "fused"})
    most = schedule
    if training.method == "chunkft":
        most = _with_chunks(planner, schedule, max(schedule.num_chunks, 64))
    also = f" and {most.num_chunks} chunks" if training.method == "chunkft" else ""
    if lean != training:
        yield lean, most, f"full activation checkpointing, fused loss{also}"
    if training.micro_batch_size > 1 and not training.update_in_backward:
        steps = training.gradient_accumulation_steps * training.micro_batch_size
        single = lean.model_copy(update={"micro_batch_size": 1, "gradient_accumulation_steps": steps})
        yield single, most, f"micro-batches of 1, {steps} accumulated,{also}".rstrip(",")
    if training.method == "full":
        chunked = lean.model_copy(update={"method": "chunkft"})
        for num_chunks in (8, 32, 128):
            yield chunked, _with_chunks(planner, schedule, num_chunks), f"method 'chunkft' with {num_chunks} chunks"


def _schedules(planner: Planner, base: ScheduleSpec) -> Iterator[ScheduleSpec]:
    """The schedule with 1, 2, 4, … times as many chunks, as far as the model has rows and a proposal makes sense."""
    num_chunks = base.num_chunks
    while num_chunks <= MAX_CHUNKS:
        yield _with_chunks(planner, base, num_chunks)
        num_chunks *= 2


def _with_chunks(planner: Planner, schedule: ScheduleSpec, num_chunks: int) -> ScheduleSpec:
    structure = planner.footprints(planner.request.training).structure
    num_rows = sum(info.num_rows for info in structure.parameters)
    return schedule.model_copy(update={"num_chunks": min(num_chunks, num_rows)})


def _alternative(evaluation: Evaluation, why: str) -> Alternative:
    return Alternative(
        schedule=evaluation.schedule,
        training=evaluation.training.model_copy(update={"schedule": evaluation.schedule}),
        peak=evaluation.peak,
        step_seconds=evaluation.step_seconds,
        fits=evaluation.fits,
        why=why,
    )
