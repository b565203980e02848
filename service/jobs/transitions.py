"""The one function that changes a job's state, and the one that writes an event."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from chunkplan.service.db.tables import EventRow, JobRow
from chunkplan.service.errors import Conflict
from chunkplan.service.job_states import TRANSITIONS, JobState, Reason


def add_event(
    session: Session, job: JobRow, kind: str, data: dict[str, Any], *, now: datetime, attempt_id: str | None = None
) -> EventRow:
    """Appends an event to a job whose row the caller has locked: the number follows from the row."""
    job.last_event += 1
    event = EventRow(job_id=job.id, attempt_id=attempt_id, number=job.last_event, type=kind, data=data, created_at=now)
    session.add(event)
    return event


def transition(
    session: Session,
    job: JobRow,
    to: JobState,
    reason: Reason,
    *,
    now: datetime,
    detail: str | None = None,
    attempt_id: str | None = None,
) -> None:
    """Moves a job, whose row the caller has locked, to another state and writes the event of it.

    Raises:
        Conflict: the transition is not allowed.
    """
    if to not in TRANSITIONS[job.state]:
        raise Conflict("job_state", f"job {job.id} is {job.state}; it cannot become {to}")
    data = {"from": job.state.value, "state": to.value, "reason": reason.value, "detail": detail}
    job.state, job.reason, job.detail = to, reason, detail
    if to is JobState.RUNNING and job.started_at is None:
        job.started_at = now
    if to.is_final:
        job.finished_at = now
        job.eta_seconds = None
    add_event(session, job, "state", data, now=now, attempt_id=attempt_id)
