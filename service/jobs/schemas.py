"""Jobs and what belongs to them, as clients see them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel

from chunkplan.engine.spec import ResolvedSchedule
from chunkplan.engine.stream.schedule import few_updates_warning
from chunkplan.service.db.tables import ArtifactRow, AttemptRow, CheckpointRow, EventRow, JobRow, MetricRow
from chunkplan.service.job_states import JobState, Reason
from chunkplan.service.kit.paging import Listed


class Progress(BaseModel):
    """How far a job is."""

    step: int
    total_steps: int | None
    loss: float | None
    eta_seconds: float | None


class JobView(Listed):
    """A job."""

    id: str
    object: Literal["job"] = "job"
    name: str
    state: JobState
    reason: Reason
    detail: str | None
    field: str | None
    """The offending field of the request, where the trainer refused its input."""
    model: str
    gpu: str
    priority: int
    plan_id: str
    profile_id: str | None
    progress: Progress
    coverage: dict[str, Any] | None
    """How many of the model's tensors were updated."""
    num_attempts: int
    request: dict[str, Any]
    training: dict[str, Any]
    """As it runs: with the schedule that was chosen."""
    output_name: str
    """Folder name of the exported model."""
    warnings: list[str]
    """About its settings."""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def of(cls, row: JobRow, profile_id: str | None = None) -> JobView:
        """The view of a stored job."""
        return cls(
            id=row.id,
            name=row.name,
            state=row.state,
            reason=row.reason,
            detail=row.detail,
            field=row.field,
            model=row.model,
            gpu=row.gpu,
            priority=row.priority,
            plan_id=row.plan_id,
            profile_id=profile_id,
            progress=Progress(step=row.step, total_steps=row.total_steps, loss=row.loss, eta_seconds=row.eta_seconds),
            coverage=row.coverage,
            num_attempts=row.num_attempts,
            request=row.request,
            training=row.run_spec["training"],
            output_name=row.run_spec["output_name"],
            warnings=_warnings(row),
            created_at=row.created_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
        )


def _warnings(row: JobRow) -> list[str]:
    training = row.run_spec["training"]
    num_updates = row.total_steps or training["max_steps"]
    if num_updates is None:
        return []
    warning = few_updates_warning(ResolvedSchedule.model_validate(training["schedule"]), num_updates)
    return [] if warning is None else [warning]


class DryRun(BaseModel):
    """What a submission would do: every check passed, and the job fits."""

    object: Literal["job.dry_run"] = "job.dry_run"
    admitted: Literal[True] = True
    plan_id: str
    predicted_bytes: int
    available_bytes: int
    device_kind: str
    num_rows: int
    training: dict[str, Any]
    warnings: list[str]


class AttemptView(Listed):
    """One process that runs, or ran, a job."""

    id: str
    object: Literal["attempt"] = "attempt"
    job_id: str
    number: int
    device: str
    upper_bytes: int
    """What it may take of the device."""
    drift_bytes: int | None
    """By how much it measured more than its plan bounds, the first time it did; None when it never did."""
    resumed_step: int | None
    last_step: int | None
    checkpoint_step: int | None
    exit_code: int | None
    reason: Reason | None
    detail: str | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None

    @classmethod
    def of(cls, row: AttemptRow) -> AttemptView:
        """The view of a stored attempt."""
        return cls(
            id=row.id,
            job_id=row.job_id,
            number=row.number,
            device=row.device,
            upper_bytes=row.upper_bytes,
            drift_bytes=row.drift_bytes,
            resumed_step=row.resumed_step,
            last_step=row.last_step,
            checkpoint_step=row.checkpoint_step,
            exit_code=row.exit_code,
            reason=row.reason,
            detail=row.failed_detail,
            created_at=row.created_at,
            started_at=row.started_at,
            ended_at=row.ended_at,
        )


class EventView(Listed):
    """Something that happened to a job."""

    id: str
    """Its number within the job, from 1: what ``after`` and ``Last-Event-ID`` take."""
    object: Literal["event"] = "event"
    job_id: str
    attempt_id: str | None
    type: str
    data: dict[str, Any]
    created_at: datetime

    @classmethod
    def of(cls, row: EventRow) -> EventView:
        """The view of a stored event."""
        return cls(
            id=str(row.number),
            job_id=row.job_id,
            attempt_id=row.attempt_id,
            type=row.type,
            data=row.data,
            created_at=row.created_at,
        )


class MetricView(Listed):
    """One training step or one evaluation."""

    id: str
    object: Literal["metric"] = "metric"
    kind: Literal["train", "eval"]
    step: int
    loss: float | None
    num_tokens: int
    learning_rate: float | None
    grad_norm: float | None
    chunk_index: int | None
    seconds: float | None
    allocated_bytes: int | None
    """The step's highest; None where it was not measured, as the next two."""
    reserved_bytes: int | None
    host_bytes: int | None
    created_at: datetime

    @classmethod
    def of(cls, row: MetricRow) -> MetricView:
        """The view of a stored metric."""
        return cls(
            id=str(row.id),
            kind="eval" if row.kind == "eval" else "train",
            step=row.step,
            loss=row.loss,
            num_tokens=row.num_tokens,
            learning_rate=row.learning_rate,
            grad_norm=row.grad_norm,
            chunk_index=row.chunk_index,
            seconds=row.seconds,
            allocated_bytes=row.allocated_bytes,
            reserved_bytes=row.reserved_bytes,
            host_bytes=row.host_bytes,
            created_at=row.created_at,
        )


class CheckpointView(Listed):
    """A checkpoint that was complete when it was recorded; old ones are removed as new ones come, and all of
    them when the job has succeeded.
    """

    id: str
    object: Literal["checkpoint"] = "checkpoint"
    job_id: str
    attempt_id: str
    step: int
    size_bytes: int
    sha256: str
    created_at: datetime

    @classmethod
    def of(cls, row: CheckpointRow) -> CheckpointView:
        """The view of a stored checkpoint."""
        return cls(
            id=row.id,
            job_id=row.job_id,
            attempt_id=row.attempt_id,
            step=row.step,
            size_bytes=row.size_bytes,
            sha256=row.sha256,
            created_at=row.created_at,
        )


class ArtifactView(Listed):
    """A file that a job made."""

    id: str
    object: Literal["artifact"] = "artifact"
    job_id: str
    name: str
    size_bytes: int
    sha256: str
    created_at: datetime

    @classmethod
    def of(cls, row: ArtifactRow) -> ArtifactView:
        """The view of a stored artifact."""
        return cls(
            id=row.id,
            job_id=row.job_id,
            name=row.name,
            size_bytes=row.size_bytes,
            sha256=row.sha256,
            created_at=row.created_at,
        )
