"""Schedules that a search may propose, and how one is named in a plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from chunkplan.engine.spec import ResolvedSchedule
from chunkplan.planner.search.evaluator import Evaluation, Evaluator
from chunkplan.planner.spec import Alternative

MAX_CHUNKS = 512
"""Finer schedules are not proposed: past this the chunk's own memory is small against everything else."""
AUTO_CHUNKS = 64
"""``auto`` goes no finer while anything fits: a cycle of more updates reaches each parameter too rarely."""


def schedules(evaluator: Evaluator, base: ResolvedSchedule) -> Iterator[ResolvedSchedule]:
    """The schedule with 1, 2, 4, … times as many chunks, as far as the model has rows and a proposal makes
    sense.
    """
    known = 0
    num_chunks = base.num_chunks
    while num_chunks <= MAX_CHUNKS:
        schedule = with_chunks(evaluator, base, num_chunks)
        if schedule.num_chunks > known:
            yield schedule
        known = schedule.num_chunks
        num_chunks *= 2


def with_chunks(evaluator: Evaluator, schedule: ResolvedSchedule, num_chunks: int) -> ResolvedSchedule:
    """Return the schedule with another number of chunks, or as many as the model has rows."""
    structure = evaluator.footprints(evaluator.request.training).structure
    num_rows = sum(info.num_rows for info in structure.parameters)
    return schedule.model_copy(update={"num_chunks": min(num_chunks, num_rows)})


def as_alternative(
    evaluation: Evaluation, role: Literal["chosen", "pareto", "nearest", "smallest"], why: str
) -> Alternative:
    """Return an evaluated schedule as a plan names it, with its role and one sentence why."""
    return Alternative(
        role=role,
        schedule=evaluation.schedule,
        training=evaluation.training.model_copy(update={"schedule": evaluation.schedule}),
        peak=evaluation.peak,
        step_seconds=evaluation.step_seconds,
        fits=evaluation.fits,
        why=why,
    )
