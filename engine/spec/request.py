"""What a user submits: a model, data, and how to train it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from chunkplan.engine.spec.base import SpecModel
from chunkplan.engine.spec.training import AskedJobTraining, JobTraining


class ModelPath(SpecModel):
    """A local Hugging Face folder (config.json; safetensors for training)."""

    path: Annotated[str, Field(min_length=1, max_length=4096)]


class ModelConfig(SpecModel):
    """An architecture given inline: the content of a Hugging Face config.json."""

    config: dict[str, Any]


ModelRef = Annotated[str, Field(min_length=1, max_length=256)] | ModelPath | ModelConfig


DEFAULT_EVAL_FRACTION = 0.05


class DatasetSpec(SpecModel):
    """Training data: a local file (``path``) or an uploaded one (``file_id``)."""

    path: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    file_id: str | None = None
    format: Literal["auto", "messages", "prompt_completion", "instruction", "text"] = "auto"
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of rows held out to evaluate on, from the end of a seeded shuffle; default 0.05, or 0 with
    validation data.
    """
    validation_path: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Rows of a file of their own to evaluate on, in the same format, instead of a share of the others."""
    validation_file_id: str | None = None
    """An uploaded file's rows to evaluate on, instead of a share of the others."""

    @property
    def has_validation(self) -> bool:
        """Whether evaluation has a file of its own."""
        return self.validation_path is not None or self.validation_file_id is not None

    @model_validator(mode="after")
    def _one_source(self) -> DatasetSpec:
        if (self.path is None) == (self.file_id is None):
            raise ValueError("give exactly one of path and file_id")
        if self.validation_path is not None and self.validation_file_id is not None:
            raise ValueError("give one of validation_path and validation_file_id, not both")
        if self.has_validation and self.eval_fraction:
            raise ValueError("eval_fraction holds out rows where there is no validation file: leave it out")
        return self

    @property
    def held_out_fraction(self) -> float:
        """Share of rows that are held out, decided."""
        if self.eval_fraction is not None:
            return self.eval_fraction
        return 0.0 if self.has_validation else DEFAULT_EVAL_FRACTION

    def normalised(self) -> DatasetSpec:
        """Return the same request with every default written out."""
        return self.model_copy(update={"eval_fraction": self.held_out_fraction})


class OutputSpec(SpecModel):
    """What the job leaves behind."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")] | None = None
    """Folder name of the exported model; default: base, size, method, data and the next free number."""
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]{0,47}$")] | None = None
    """Stands in the default name instead of the data's."""
    merge: bool = False
    """With method ``lora``: export the model with the adapters added to its weights, not the adapters."""

    @model_validator(mode="after")
    def _one_name(self) -> OutputSpec:
        if self.name is not None and self.suffix is not None:
            raise ValueError("give name or suffix, not both: a suffix is a part of the default name")
        return self


MetadataKey = Annotated[str, Field(pattern=r"^[ !#-\[\]-~]{1,64}$")]
"""Printable ASCII without quotation mark and backslash."""

MetadataValue = Annotated[str, Field(max_length=512, pattern=r"^[^\x00]*$")]


class JobRequest(SpecModel):
    """What a user submits: over HTTP, or as the job file of ``chunkplan train``."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")] = "job"
    model: ModelRef
    gpu: str | dict[str, Any] | None = None
    """A catalog id, an inline GPU, a kind of device (``cpu``, ``cuda``), or a device of the server
    (``cuda:1``); default: what the machine has."""
    training: AskedJobTraining = Field(default_factory=lambda: JobTraining().normalised())
    dataset: Annotated[DatasetSpec, AfterValidator(DatasetSpec.normalised)]
    output: OutputSpec = Field(default_factory=OutputSpec)
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] = Field(default_factory=dict)
    """The user's own notes on the job."""
    plan_id: str | None = None

    @model_validator(mode="after")
    def _adapters_are_merged(self) -> JobRequest:
        if self.output.merge and self.training.method != "lora":
            raise ValueError("output.merge adds adapters to the weights: only for training.method 'lora'")
        return self
