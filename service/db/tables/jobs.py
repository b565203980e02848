"""Jobs, their attempts and their events."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from chunkplan.service.db.base import Base, BigKey, Identifier, Name, OfJob, Owned, Reference, choice
from chunkplan.service.job_states import JobState, Reason


class JobRow(Owned, Base):
    """One fine-tuning job."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "project", "created_at", "id"),
        Index(None, "project", "model", "created_at"),
        Index(None, "project", "state", "created_at"),
        Index(None, "project", "finished_at", "id"),
        Index(None, "finished_at", "id"),
        Index(None, "state", "device", "turn_at", "id", "upper_bytes"),
    )

    id: Mapped[Identifier] = mapped_column(primary_key=True)
    name: Mapped[Name]
    state: Mapped[JobState] = mapped_column(choice(JobState))
    reason: Mapped[Reason] = mapped_column(choice(Reason))
    detail: Mapped[str | None] = mapped_column(Text)
    field: Mapped[str | None] = mapped_column(Text)
    """The offending field of the request, where the trainer refused its input."""
    model: Mapped[Reference]
    gpu: Mapped[Name]
    device: Mapped[Name]
    """What a device must be called to run it: its kind (``cpu``, ``cuda``), its name (``cuda:1``), or its
    GPU's."""
    priority: Mapped[int]
    turn_at: Mapped[datetime]
    """Whose is earliest is next: see `chunkplan.service.jobs.admission`."""
    plan_id: Mapped[Identifier] = mapped_column(ForeignKey("plans.id"), index=True)
    upper_bytes: Mapped[int]
    """What it may take of a device: its plan's bound and ``extra_bytes``."""
    extra_bytes: Mapped[int] = mapped_column(default=0)
    """By how much an attempt that ran out of memory was above its plan."""
    num_out_of_memory: Mapped[int] = mapped_column(default=0)
    """How many attempts ran out of memory."""
    replan: Mapped[Name | None]
    """Why it must be planned anew before it starts; None where its plan only has to be up to date."""
    file_id: Mapped[Identifier | None] = mapped_column(index=True)
    request: Mapped[dict[str, Any]]
    run_spec: Mapped[dict[str, Any]]
    coverage: Mapped[dict[str, Any] | None]

    step: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int | None]
    loss: Mapped[float | None]
    eta_seconds: Mapped[float | None]

    num_attempts: Mapped[int] = mapped_column(default=0)
    num_failures: Mapped[int] = mapped_column(default=0)
    """Failed attempts in a row, none of which got past the checkpoint it started from."""
    last_event: Mapped[int] = mapped_column(default=0)
    """Number of the newest event; taken under the row's lock, so a reader never sees a gap that fills later.
    """
    created_at: Mapped[datetime]
    not_before: Mapped[datetime]
    """A queued job is not started earlier than this."""
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class AttemptRow(OfJob, Base):
    """One process that runs, or ran, a job. Its token fences its writes: see
    `chunkplan.service.execution.records.ingest`.
    """

    __tablename__ = "attempts"
    __table_args__ = (UniqueConstraint("job_id", "number"), Index(None, "ended_at", "lease_expires_at"))

    id: Mapped[Identifier] = mapped_column(primary_key=True)
    number: Mapped[int]
    token: Mapped[Identifier]
    owner: Mapped[Name]
    """The server process that looks after it."""
    process: Mapped[Name | None]
    host: Mapped[Name]
    """Where it runs: a device is known by its host and its name."""
    device: Mapped[Name]
    upper_bytes: Mapped[int]
    """What it may take of the device: as the job's when it was given to it."""
    lease_expires_at: Mapped[datetime]
    events_offset: Mapped[int] = mapped_column(default=0)
    """Bytes of its event file that are in the database."""
    resumed_step: Mapped[int | None]
    last_step: Mapped[int | None]
    checkpoint_step: Mapped[int | None]
    finished_reason: Mapped[str | None] = mapped_column(Text)
    """What the trainer said at its end: ``completed`` or ``stopped``."""
    failed_reason: Mapped[str | None] = mapped_column(Text)
    failed_detail: Mapped[str | None] = mapped_column(Text)
    failed_field: Mapped[str | None] = mapped_column(Text)
    needed_bytes: Mapped[int | None]
    """What it held on its device and asked for when it ran out of memory."""
    bounds: Mapped[dict[str, Any] | None]
    """What its plan bounds, in bytes, by the name of the sample's figure that is to stay below."""
    drift_bytes: Mapped[int | None]
    """By how much a figure rose above its bound for the first time; None when none did."""
    exit_code: Mapped[int | None]
    reason: Mapped[Reason | None] = mapped_column(choice(Reason))
    """Why it ended."""
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]


class EventRow(OfJob, Base):
    """Something that happened to a job; numbered from 1 within the job."""

    __tablename__ = "events"
    __table_args__ = (UniqueConstraint("job_id", "number"), Index(None, "type", "created_at"))

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    attempt_id: Mapped[Identifier | None] = mapped_column(ForeignKey("attempts.id"))
    number: Mapped[int]
    type: Mapped[Name]
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
