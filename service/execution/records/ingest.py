"""From a trainer's messages to rows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatchmethod
from typing import Any

from sqlalchemy.orm import Session

from chunkplan.engine.protocol import (
    MAX_INTEGER,
    ArtifactEvent,
    CheckpointEvent,
    CoverageEvent,
    EvalEvent,
    Event,
    FailedEvent,
    FinishedEvent,
    StartedEvent,
    StepEvent,
)
from chunkplan.service.db.tables import ArtifactRow, CheckpointRow, JobRow, MetricRow, SampleRow
from chunkplan.service.execution.records.drift import drift
from chunkplan.service.execution.repository import AttemptRepository
from chunkplan.service.job_states import JobState, Reason
from chunkplan.service.jobs.transitions import add_event, transition
from chunkplan.service.kit.ids import new_id
from chunkplan.service.profiles.usage import UsageBook


class Ingestion:
    """Applies messages of one attempt to its job; both rows are locked by the caller, and the token was
    checked.

    The first message that reports more than a bound makes a second event. `attempt_values` collects what
    changes in the attempt's own row; the caller writes it, once, with the new offset.
    """

    def __init__(self, session: Session, job: JobRow, attempt_id: str, bounds: Mapping[str, int]) -> None:
        self._session = session
        self._job = job
        self._attempt_id = attempt_id
        self._bounds = bounds
        self._usage = UsageBook(session, job)
        self.attempt_values: dict[str, Any] = {}

    def add(self, message: Event) -> None:
        """Applies a message and records it as an event."""
        self._apply(message)
        self._add_event(message, message.type, message.data)
        found = drift(message, self._bounds)
        if found is not None:
            self._bounds = {}  # said once, not at every step
            self.attempt_values["drift_bytes"] = found["excess_bytes"]
            self._add_event(message, "drift", found)

    def _add_event(self, message: Event, kind: str, data: dict[str, Any]) -> None:
        add_event(self._session, self._job, kind, data, now=message.time, attempt_id=self._attempt_id)

    @singledispatchmethod
    def _apply(self, message: Event) -> None:
        """Messages of other types are events and nothing more."""

    @_apply.register
    def _(self, message: StartedEvent) -> None:
        self._run(message)
        self._job.total_steps = min(message.total_steps, MAX_INTEGER)
        self._job.step = message.resumed_step
        self.attempt_values |= {"resumed_step": message.resumed_step, "started_at": message.time}
        AttemptRepository(self._session).supersede_metrics(self._job.id, self._attempt_id, message.resumed_step)

    @_apply.register
    def _(self, message: StepEvent) -> None:
        self._run(message)
        job = self._job
        job.step, job.loss, job.eta_seconds = message.step, message.loss, message.eta_seconds
        self.attempt_values["last_step"] = message.step
        highest = {
            name: max((getattr(sample, name) for sample in message.samples), default=None)
            for name in ("allocated_bytes", "reserved_bytes", "host_bytes")
        }
        self._usage.add_step(message.time, message.seconds, message.num_tokens, highest["allocated_bytes"])
        self._session.add(
            MetricRow(
                job_id=job.id,
                attempt_id=self._attempt_id,
                kind="train",
                step=message.step,
                loss=message.loss,
                num_tokens=message.num_tokens,
                learning_rate=message.learning_rate,
                grad_norm=message.grad_norm,
                chunk_index=message.chunk_index,
                seconds=message.seconds,
                created_at=message.time,
                **highest,
            )
        )
        self._session.add_all(
            SampleRow(
                job_id=job.id,
                attempt_id=self._attempt_id,
                step=message.step,
                chunk_index=message.chunk_index,
                created_at=message.time,
                **sample.model_dump(),
            )
            for sample in message.samples
        )

    @_apply.register
    def _(self, message: EvalEvent) -> None:
        self._session.add(
            MetricRow(
                job_id=self._job.id,
                attempt_id=self._attempt_id,
                kind="eval",
                step=message.step,
                loss=message.loss,
                num_tokens=message.num_tokens,
                created_at=message.time,
            )
        )

    @_apply.register
    def _(self, message: CheckpointEvent) -> None:
        self.attempt_values["checkpoint_step"] = message.step
        self._session.add(
            CheckpointRow(
                id=new_id("ckpt", message.time),
                job_id=self._job.id,
                attempt_id=self._attempt_id,
                step=message.step,
                path=message.path,
                size_bytes=message.size_bytes,
                sha256=message.sha256,
                created_at=message.time,
            )
        )

    @_apply.register
    def _(self, message: ArtifactEvent) -> None:
        row = AttemptRepository(self._session).artifact(self._job.id, message.name)
        if row is None:
            row = ArtifactRow(id=new_id("art", message.time), job_id=self._job.id, name=message.name)
            self._session.add(row)
        row.attempt_id, row.path, row.created_at = self._attempt_id, message.path, message.time
        row.size_bytes, row.sha256 = message.size_bytes, message.sha256

    @_apply.register
    def _(self, message: CoverageEvent) -> None:
        self._job.coverage = message.data

    @_apply.register
    def _(self, message: FinishedEvent) -> None:
        self.attempt_values["finished_reason"] = message.reason

    @_apply.register
    def _(self, message: FailedEvent) -> None:
        self._job.field = message.field
        self.attempt_values |= {
            "failed_reason": message.reason,
            "failed_detail": message.detail,
            "failed_field": message.field,
            "needed_bytes": message.needed_bytes,
        }

    def _run(self, message: Event) -> None:
        if self._job.state is JobState.STARTING:
            transition(
                self._session,
                self._job,
                JobState.RUNNING,
                Reason.STARTED,
                now=message.time,
                attempt_id=self._attempt_id,
            )
