"""From OpenAI's request for a fine-tuning job to a job request; what cannot be done is refused by its name.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, field_validator

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import (
    JobRequest,
    JobTraining,
    MetadataKey,
    MetadataValue,
    OutputSpec,
    SpecModel,
    parse,
)

BASE_LEARNING_RATE = float(JobTraining.model_fields["learning_rate"].default)
"""What ``learning_rate_multiplier`` multiplies."""


def _unless_auto(value: object) -> object:
    return None if value == "auto" else value


_COUNT: TypeAlias = Annotated[int, Field(ge=1, le=1_000_000)]
_FACTOR: TypeAlias = Annotated[float, Field(gt=0)]
Count = Annotated[_COUNT | None, BeforeValidator(_unless_auto, json_schema_input_type=Literal["auto"] | _COUNT | None)]
Factor = Annotated[
    _FACTOR | None, BeforeValidator(_unless_auto, json_schema_input_type=Literal["auto"] | _FACTOR | None)
]


class Hyperparameters(SpecModel):
    """OpenAI's names of three settings; ``auto`` leaves each at its default."""

    n_epochs: Count = None
    batch_size: Count = None
    """Rows per update: micro-batches of ``chunkplan.training.micro_batch_size`` rows are accumulated."""
    learning_rate_multiplier: Factor = None
    """Factor of 2e-5."""


class Supervised(SpecModel):
    """Options of the one method."""

    hyperparameters: Hyperparameters | None = None


class Method(SpecModel):
    """How to train: supervised. Whether all parameters are trained, or adapters, says
    ``chunkplan.training.method``.
    """

    type: Literal["supervised"] = "supervised"
    supervised: Supervised | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _is_supervised(cls, value: object) -> object:
        if value != "supervised":
            raise ValueError("only 'supervised' fine-tuning is done here")
        return value


class DatasetOptions(SpecModel):
    """How the training file is read."""

    format: Literal["auto", "messages", "prompt_completion", "instruction", "text"] = "auto"
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of its rows that is held out for evaluation where there is no validation file."""


class ChunkplanOptions(SpecModel):
    """What OpenAI's request has no name for, as in a job request."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")] = "job"
    gpu: str | dict[str, Any] | None = None
    training: JobTraining = Field(default_factory=JobTraining)
    dataset: DatasetOptions = Field(default_factory=DatasetOptions)
    output: OutputSpec = Field(default_factory=OutputSpec)
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    plan_id: str | None = None


class FineTuningRequest(SpecModel):
    """What OpenAI's clients send to create a job, and ``chunkplan`` with everything that is ours."""

    model: Annotated[str, Field(min_length=1, max_length=4096)]
    """A catalog id, a Hugging Face name of the catalog, or a folder: a path that begins with ``/``, ``.`` or
    ``~``."""
    training_file: Annotated[str, Field(min_length=1, max_length=80)]
    validation_file: Annotated[str, Field(min_length=1, max_length=80)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """Their older place; now in ``method.supervised``."""
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]{0,47}$")] | None = None
    """Stands in the name of the exported model instead of the data's."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None
    chunkplan: ChunkplanOptions = Field(default_factory=ChunkplanOptions)

    @field_validator("integrations", mode="before")
    @classmethod
    def _no_integrations(cls, value: object) -> object:
        if value:
            raise ValueError(
                "runs are not reported to other services: leave it out; metrics are at /v1/jobs/{id}/metrics"
            )
        return value


def job_request(request: FineTuningRequest) -> JobRequest:
    """Return the request as `chunkplan.service.jobs` takes it.

    Raises:
        InputError: something is said twice, or contradicts something else; see `in_their_words`.
    """
    options = request.chunkplan
    output = options.output.model_dump(exclude_unset=True)
    if request.suffix is not None:
        _say_once("suffix", output, "output", "suffix", "name")
        output["suffix"] = request.suffix
    value = {
        "name": options.name,
        "model": {"path": request.model} if request.model[0] in "/.~" else request.model,
        "gpu": options.gpu,
        "training": _training(request),
        "dataset": _dataset(request),
        "output": output,
        "priority": options.priority,
        "metadata": request.metadata or {},
        "plan_id": options.plan_id,
    }
    return parse(JobRequest, value)


def _dataset(request: FineTuningRequest) -> dict[str, Any]:
    dataset = request.chunkplan.dataset.model_dump(exclude_unset=True)
    dataset["file_id"] = request.training_file
    if request.validation_file is not None:
        _say_once("validation_file", dataset, "dataset", "eval_fraction")
        dataset["validation_file_id"] = request.validation_file
    return dataset


def _training(request: FineTuningRequest) -> dict[str, Any]:
    training = request.chunkplan.training.model_dump(exclude_unset=True)
    settings, place = _hyperparameters(request)
    if settings.n_epochs is not None:
        _say_once(f"{place}.n_epochs", training, "training", "epochs", "max_steps")
        training["epochs"] = settings.n_epochs
    if settings.batch_size is not None:
        _say_once(f"{place}.batch_size", training, "training", "gradient_accumulation_steps")
        size = request.chunkplan.training.micro_batch_size
        if settings.batch_size % size:
            message = f"should be a multiple of chunkplan.training.micro_batch_size, which is {size}"
            raise InputError(f"{place}.batch_size", message)
        training["gradient_accumulation_steps"] = settings.batch_size // size
    if settings.learning_rate_multiplier is not None:
        field = f"{place}.learning_rate_multiplier"
        _say_once(field, training, "training", "learning_rate")
        training["learning_rate"] = settings.learning_rate_multiplier * BASE_LEARNING_RATE
        if training["learning_rate"] > _MAX_LEARNING_RATE:
            raise InputError(field, f"makes a learning rate above {_MAX_LEARNING_RATE:g}")
    if request.seed is not None:
        _say_once("seed", training, "training", "seed")
        training["seed"] = request.seed
    return training


_MAX_LEARNING_RATE = 10.0
"""Highest rate that a job request takes."""


def _hyperparameters(request: FineTuningRequest) -> tuple[Hyperparameters, str]:
    """The hyperparameters, and where they were given."""
    method = request.method
    inner = method.supervised.hyperparameters if method and method.supervised else None
    if inner is None:
        return request.hyperparameters or Hyperparameters(), "hyperparameters"
    if request.hyperparameters is not None:
        raise InputError("hyperparameters", "given in method.supervised too: give them once")
    return inner, "method.supervised.hyperparameters"


def _say_once(field: str, given: dict[str, Any], part: str, *names: str) -> None:
    """Refuses what was also said in our own words.

    Raises:
        InputError: for ``field``.
    """
    for name in names:
        if given.get(name) is not None:
            raise InputError(field, f"says the same as chunkplan.{part}.{name}: give one of them")


_NAMES = {
    "request": "chunkplan",
    "model": "model",
    "model.path": "model",
    "dataset.file_id": "training_file",
    "dataset.path": "training_file",
    "dataset.validation_file_id": "validation_file",
    "dataset.validation_path": "validation_file",
    "metadata": "metadata",
    "Idempotency-Key": "Idempotency-Key",
}
_THEIR_FIELDS = ("hyperparameters", "method", "suffix", "seed", "validation_file")


@contextmanager
def in_their_words() -> Iterator[None]:
    """Refusals of a job request name the fields of the request that it was made from."""
    try:
        yield
    except InputError as error:
        if error.field.startswith(_THEIR_FIELDS):
            raise
        raise InputError(their_field(error.field), error.message) from error


def their_field(field: str) -> str:
    """A job request's field, as the request for a fine-tuning job has it."""
    return _NAMES.get(field, f"chunkplan.{field}")
