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
        return cls.from_row(
            row,
            profile_id=profile_id,
            progress=Progress(step=row.step, total_steps=row.total_steps, loss=row.loss, eta_seconds=row.eta_seconds),
            training=row.run_spec["training"],
            output_name=row.run_spec["output_name"],
            warnings=_warnings(row),
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
        return cls.from_row(row, detail=row.failed_detail)


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
        return cls.from_row(row, id=str(row.number))


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
        return cls.from_row(row, id=str(row.id))


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
        return cls.from_row(row)


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
        return cls.from_row(row)
