"""What a trainer reports, as docs/architecture.md lists it, and reading it from its event file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import structlog
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

log = structlog.get_logger(__name__)

MAX_INTEGER = 2**63 - 1
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Bytes = Count
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RelativePath = Annotated[str, Field(min_length=1, max_length=4096)]


class Message(BaseModel):
    """Anything that a trainer reports."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str
    time: AwareDatetime

    @property
    def data(self) -> dict[str, Any]:
        """What goes into the event's row."""
        return self.model_dump(mode="json", exclude={"type", "time"})


class Started(Message):
    type: Literal["started"]
    total_steps: int
    resumed_step: Count


class PhaseSample(BaseModel):
    phase: Annotated[str, Field(max_length=64)]
    allocated_bytes: Bytes
    reserved_bytes: Bytes
    host_bytes: Bytes
    seconds: float


class Step(Message):
    type: Literal["step"]
    step: Count
    chunk_index: Count
    loss: float | None
    learning_rate: float | None = None
    grad_norm: float | None = None
    num_tokens: Count
    seconds: float
    eta_seconds: float | None = None
    samples: list[PhaseSample]

    @property
    def data(self) -> dict[str, Any]:
        """What goes into the event's row: samples have a table of their own."""
        return self.model_dump(mode="json", exclude={"type", "time", "samples"})


class Eval(Message):
    type: Literal["eval"]
    step: Count
    loss: float | None
    num_tokens: Count


class Checkpoint(Message):
    type: Literal["checkpoint"]
    step: Count
    path: RelativePath
    size_bytes: Bytes
    sha256: Sha256


class Artifact(Message):
    type: Literal["artifact"]
    name: RelativePath
    path: RelativePath
    size_bytes: Bytes
    sha256: Sha256


class Coverage(Message):
    type: Literal["coverage"]
    num_tensors: Count
    num_tensors_updated: Count
    not_updated: list[str]


class Finished(Message):
    type: Literal["finished"]
    step: Count
    reason: Literal["completed", "stopped"]
    process_peak_bytes: Bytes | None = None


class Failed(Message):
    type: Literal["failed"]
    reason: Literal["input", "out_of_memory", "diverged", "error"]
    detail: str
    field: str | None = None
    needed_bytes: Bytes | None = None


Known = Started | Step | Eval | Checkpoint | Artifact | Coverage | Finished | Failed
_KNOWN: TypeAdapter[Known] = TypeAdapter(Annotated[Known, Field(discriminator="type")])
_KNOWN_TYPES = {"started", "step", "eval", "checkpoint", "artifact", "coverage", "finished", "failed"}


@dataclass(frozen=True)
class Batch:
    """Messages read from an event file, and where reading goes on."""

    messages: list[Message]
    next_offset: int


def read_messages(path: Path, offset: int, max_bytes: int = 1 << 20) -> Batch:
    """Complete lines from ``offset`` on; a last line without its newline is left for the next time.

    A line that says nothing understandable is logged and passed over: it must not stop what comes after it.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            block = file.read(max_bytes)
            if len(block) == max_bytes and b"\n" not in block:
                block += file.readline()
    except FileNotFoundError:
        return Batch([], offset)
    end = block.rfind(b"\n") + 1
    messages = [message for line in block[:end].splitlines() if (message := _parse(line)) is not None]
    return Batch(messages, offset + end)


def _parse(line: bytes) -> Message | None:
    try:
        value = _storable(json.loads(line))
        if isinstance(value, dict) and value.get("type") in _KNOWN_TYPES:
            return _KNOWN.validate_python(value)
        return Message.model_validate(value)
    except (ValueError, ValidationError, RecursionError) as error:
        log.warning("a trainer's line was passed over", error=str(error).splitlines()[0], line=line[:200])
        return None


def _storable(value: Any) -> Any:
    """What no JSON column can hold is made harmless: numbers that are not finite, NUL, halves of surrogate
    pairs.
    """
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_storable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return value.replace("\x00", "").encode(errors="replace").decode()
    return value
