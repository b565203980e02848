"""What a trainer and whoever started it say to each other: exit codes, and one model for each kind of event.

The trainer writes these events to its event file, a line each; the service and ``chunkplan train`` read them
there. docs/architecture.md describes the rest of the protocol, and a test compares its tables with this
module. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, PlainSerializer, TypeAdapter

EXIT_COMPLETED = 0
"""The run has finished; its artifacts are complete."""
EXIT_FAILED = 1
"""The run has failed; its last event says why."""
EXIT_STOPPED = 75
"""The run stopped on request, with a complete checkpoint."""
EXIT_DEVICE_BUSY = 76
"""Another trainer has the device, or runs the same job."""

MAX_INTEGER = 2**63 - 1
"""Largest count that every reader can store."""
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
NumBytes = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RelativePath = Annotated[str, Field(min_length=1, max_length=4096)]
"""A path within the run's folder."""


def _now() -> datetime:
    return datetime.now(UTC)


def _to_milliseconds(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Event(BaseModel):
    """Anything that a trainer reports. Readers keep what a newer trainer adds to the fields that
    they know.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str
    time: Annotated[AwareDatetime, PlainSerializer(_to_milliseconds, when_used="json")] = Field(default_factory=_now)

    @property
    def data(self) -> dict[str, Any]:
        """The event's fields as JSON values, but for its type and time."""
        return self.model_dump(mode="json", exclude={"type", "time"})


class LoadingEvent(Event):
    """The attempt has begun: imports are done, model and data are being read."""

    type: Literal["loading"] = "loading"


class StartedEvent(Event):
    """Model and data are there; the first update comes next."""

    type: Literal["started"] = "started"
    pid: int | None = None
    device: str | None = None
    num_parameters: Count | None = None
    num_trainable_parameters: Count | None = None
    """Fewer than all with adapters."""
    num_chunks: Count | None = None
    total_steps: int
    resumed_step: Count
    """Update after which the attempt goes on; 0 in a new run."""
    dataset: dict[str, Any] | None = None
    """What became of the rows, see :class:`chunkplan.engine.data.DatasetStats`."""


class PhaseSample(BaseModel):
    """The highest memory of one phase of an update, and its time."""

    model_config = ConfigDict(frozen=True)

    phase: Annotated[str, Field(max_length=64)]
    allocated_bytes: NumBytes
    reserved_bytes: NumBytes
    host_bytes: NumBytes
    seconds: float


class StepEvent(Event):
    """One optimizer update."""

    type: Literal["step"] = "step"
    step: Count
    """Number of the update, from 1."""
    total_steps: Count | None = None
    chunk_index: Count
    visit: Count | None = None
    loss: float | None
    learning_rate: float | None = None
    grad_norm: float | None = None
    """Norm of the chunk's gradients before clipping; None without clipping."""
    skipped: bool = False
    """The gradients overflowed in fp16: there was no update, and the loss scale is smaller now."""
    num_tokens: Count
    seconds: float
    eta_seconds: float | None = None
    samples: list[PhaseSample]
    """One for each phase: load, forward, backward, optimizer."""

    @property
    def data(self) -> dict[str, Any]:
        """The event's fields but for its samples, which readers keep apart."""
        return self.model_dump(mode="json", exclude={"type", "time", "samples"})


class EvalEvent(Event):
    """The loss on held-out data after an update."""

    type: Literal["eval"] = "eval"
    step: Count
    loss: float | None
    perplexity: float | None = None
    num_tokens: Count
    samples: list[PhaseSample] = []
    """One, of phase evaluation: the highest of its batches."""


class CheckpointEvent(Event):
    """A checkpoint is complete."""

    type: Literal["checkpoint"] = "checkpoint"
    step: Count
    path: RelativePath
    size_bytes: NumBytes
    sha256: Sha256
    """Digest of its manifest."""
    samples: list[PhaseSample] = []
    """One, of phase checkpoint."""


class ArtifactEvent(Event):
    """A file of the exported model is complete."""

    type: Literal["artifact"] = "artifact"
    name: RelativePath
    path: RelativePath
    size_bytes: NumBytes
    sha256: Sha256


class WarningEvent(Event):
    """One line that the user should know of."""

    type: Literal["warning"] = "warning"
    detail: str


class CoverageEvent(Event):
    """Which tensors differ from the base model at the end."""

    type: Literal["coverage"] = "coverage"
    num_tensors: Count
    num_tensors_updated: Count
    not_updated: list[str]


class FinishedEvent(Event):
    """The attempt is over, and all is well."""

    type: Literal["finished"] = "finished"
    step: Count
    reason: Literal["completed", "stopped"]
    process_peak_bytes: NumBytes | None = None
    """The process's highest resident memory."""


class FailedEvent(Event):
    """The attempt is over, and this is why."""

    type: Literal["failed"] = "failed"
    reason: Literal["input", "out_of_memory", "diverged", "error"]
    detail: str
    """One line."""
    field: str | None = None
    """Name of the offending field, for ``input``."""
    needed_bytes: NumBytes | None = None
    """For ``out_of_memory``: what the run held at its highest (reserved on a GPU, the process on the CPU),
    and what it asked for in the end.
    """


KnownEvent = (
    LoadingEvent | StartedEvent | StepEvent | EvalEvent | CheckpointEvent | ArtifactEvent | WarningEvent
    | CoverageEvent | FinishedEvent | FailedEvent
)  # fmt: skip
EVENTS: dict[str, type[Event]] = {
    model.model_fields["type"].default: model
    for model in (
        LoadingEvent, StartedEvent, StepEvent, EvalEvent, CheckpointEvent, ArtifactEvent, WarningEvent,
        CoverageEvent, FinishedEvent, FailedEvent,
    )
}  # fmt: skip
"""The kinds of event, by what their ``type`` says."""
Report: TypeAlias = Callable[[Event], None]
"""Takes an event of a run."""

_ANY_EVENT: TypeAdapter[KnownEvent] = TypeAdapter(Annotated[KnownEvent, Field(discriminator="type")])


def parse_event(value: object) -> Event:
    """Return the event that a line of an event file stands for, of the kind that its type says.

    Raises:
        ValidationError: it is no event, or one of a known kind with something wrong in it.
    """
    if isinstance(value, dict) and value.get("type") in EVENTS:
        return _ANY_EVENT.validate_python(value)
    return Event.model_validate(value)
