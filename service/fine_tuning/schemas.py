"""Jobs, events and checkpoints in the shape of OpenAI's fine-tuning API."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from chunkplan.service.db.tables import CheckpointRow, EventRow, JobRow
from chunkplan.service.fine_tuning.requests import BASE_LEARNING_RATE, their_field
from chunkplan.service.job_states import JobState
from chunkplan.service.jobs.schemas import JobView
from chunkplan.service.kit.paging import Listed

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
"""OpenAI's ``validating_files`` does not occur: a file is checked before there is a job."""

STATUS: Mapping[JobState, Status] = {
    JobState.QUEUED: "queued",
    JobState.STARTING: "running",
    JobState.RUNNING: "running",
    JobState.PAUSING: "running",
    JobState.PAUSED: "paused",
    JobState.CANCELLING: "running",
    JobState.SUCCEEDED: "succeeded",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
    JobState.REJECTED: "failed",
}


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class HyperparametersView(BaseModel):
    """As the job runs with them."""

    n_epochs: float | None
    """None: the job's length is a number of updates."""
    batch_size: int
    learning_rate_multiplier: float


class SupervisedView(BaseModel):
    """Options of the one method."""

    hyperparameters: HyperparametersView


class MethodView(BaseModel):
    """How the job trains."""

    type: Literal["supervised"] = "supervised"
    supervised: SupervisedView


class FineTuningJobView(Listed):
    """A job."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: Status
    error: JobError | None
    model: str
    fine_tuned_model: str | None
    """Folder of the exported model; it may be the ``model`` of another job."""
    training_file: str
    """The file's id, or the path that the job was submitted with."""
    validation_file: str | None
    hyperparameters: HyperparametersView
    method: MethodView
    seed: int
    metadata: dict[str, str] | None
    organization_id: str
    """The project."""
    trained_tokens: int | None = None
    """Tokens of the sequences that a succeeded job was trained on, padding included; null in lists."""
    result_files: list[str]
    """None: the figures are at ``/v1/jobs/{id}/metrics``."""
    integrations: list[str]
    chunkplan: JobView
    """The job as ``/v1/jobs/{id}`` shows it."""

    @classmethod
    def of(cls, row: JobRow, *, profile_id: str | None, runs_dir: Path, now: datetime) -> FineTuningJobView:
        """The view of a stored job."""
        training = row.run_spec["training"]
        hyperparameters = _hyperparameters(training)
        is_estimated = row.state is JobState.RUNNING and row.eta_seconds is not None
        return cls(
            id=row.id,
            created_at=_seconds(row.created_at),
            finished_at=None if row.finished_at is None else _seconds(row.finished_at),
            estimated_finish=_seconds(now + timedelta(seconds=row.eta_seconds or 0)) if is_estimated else None,
            status=STATUS[row.state],
            error=_error(row),
            model=row.model,
            fine_tuned_model=_exported_folder(row, runs_dir) if row.state is JobState.SUCCEEDED else None,
            training_file=_file(row.request["dataset"], "") or "",
            validation_file=_file(row.request["dataset"], "validation_"),
            hyperparameters=hyperparameters,
            method=MethodView(supervised=SupervisedView(hyperparameters=hyperparameters)),
            seed=training["seed"],
            metadata=row.request.get("metadata") or None,
            organization_id=row.project,
            result_files=[],
            integrations=[],
            chunkplan=JobView.of(row, profile_id),
        )


def _hyperparameters(training: Mapping[str, Any]) -> HyperparametersView:
    epochs = None if training["max_steps"] is not None else training["epochs"] or 1.0
    return HyperparametersView(
        n_epochs=epochs,
        batch_size=training["micro_batch_size"] * training["gradient_accumulation_steps"],
        learning_rate_multiplier=float(f"{training['learning_rate'] / BASE_LEARNING_RATE:.12g}"),
    )


def _error(row: JobRow) -> JobError | None:
    if STATUS[row.state] != "failed":
        return None
    param = None if row.field is None else their_field(row.field)
    return JobError(code=row.reason.value, message=row.detail or row.reason.value, param=param)


def _file(dataset: Mapping[str, Any], prefix: str) -> str | None:
    name: str | None = dataset.get(f"{prefix}file_id") or dataset.get(f"{prefix}path")
    return name


def _exported_folder(row: JobRow, runs_dir: Path) -> str:
    return str(runs_dir / row.id / "artifacts" / row.run_spec["output_name"])


def _seconds(time: datetime) -> int:
    return int(time.timestamp())


class FineTuningEventView(Listed):
    """Something that happened to a job."""

    id: str
    """Its number within the job, from 1."""
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]
    """What ``/v1/jobs/{id}/events`` has, its type as ``event``; losses under OpenAI's names too."""

    @classmethod
    def of(cls, row: EventRow) -> FineTuningEventView:
        """The view of a stored event."""
        return cls(
            id=str(row.number),
            created_at=_seconds(row.created_at),
            level=_level(row),
            message=_message(row.type, row.data),
            type="metrics" if row.type in _LOSSES else "message",
            data=row.data | {"event": row.type} | _loss(row),
        )


_LOSSES = {"step": "train_loss", "eval": "full_valid_loss"}


def _loss(row: EventRow) -> dict[str, Any]:
    return {_LOSSES[row.type]: row.data.get("loss")} if row.type in _LOSSES else {}


def _level(row: EventRow) -> Literal["info", "warn", "error"]:
    if row.type == "failed" or row.data.get("state") in {"failed", "rejected"}:
        return "error"
    return "warn" if row.type in {"warning", "drift"} else "info"


def _message(kind: str, data: Mapping[str, Any]) -> str:
    """What an event says, in one line."""
    given = {name: data.get(name) for name in ("step", "total_steps", "resumed_step", "name", "detail", "loss")}
    match kind:
        case "state":
            reason = data.get("detail") or str(data.get("reason")).replace("_", " ")
            return f"Job {data.get('state')}: {reason}"
        case "started":
            return "Training of {total_steps} steps started at step {resumed_step}".format(**given)
        case "step":
            return f"Step {given['step']}/{given['total_steps']}: training loss={_figure(given['loss'])}"
        case "eval":
            return f"Step {given['step']}: validation loss={_figure(given['loss'])}"
        case "checkpoint":
            return "Checkpoint at step {step}".format(**given)
        case "artifact":
            return "Made {name}".format(**given)
        case "replanned":
            return f"Planned anew: {str(data.get('reason')).replace('_', ' ')}; up to {data.get('upper_bytes')} bytes"
        case "drift":
            return f"Used {data.get('measured_bytes')} bytes, more than the {data.get('bound_bytes')} of its plan"
        case "finished":
            return "Training ended at step {step}".format(**given)
        case _:
            return str(given["detail"] or kind.replace("_", " ").capitalize())


def _figure(loss: object) -> str:
    return f"{loss:.4f}" if isinstance(loss, int | float) else "not finite"


class CheckpointMetrics(BaseModel):
    """Losses at a checkpoint, where they were measured."""

    step: int
    train_loss: float | None
    full_valid_loss: float | None


class FineTuningCheckpointView(Listed):
    """A checkpoint that was complete when it was recorded."""

    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    """A name: checkpoints are for resuming, and only exported models can be used."""
    step_number: int
    metrics: CheckpointMetrics

    @classmethod
    def of(
        cls, row: CheckpointRow, output_name: str, train_loss: float | None, eval_loss: float | None
    ) -> FineTuningCheckpointView:
        """The view of a stored checkpoint."""
        return cls(
            id=row.id,
            created_at=_seconds(row.created_at),
            fine_tuning_job_id=row.job_id,
            fine_tuned_model_checkpoint=f"{output_name}:ckpt-step-{row.step}",
            step_number=row.step,
            metrics=CheckpointMetrics(step=row.step, train_loss=train_loss, full_valid_loss=eval_loss),
        )
