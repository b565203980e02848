"""What a user can ask for: the training spec and the job spec, shared by engine, planner and service.

Imports no torch: servers and cached plans load this module.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema

from chunkplan.engine.errors import InputError


class SpecModel(BaseModel):
    """Base of every request model: unknown fields and values of another type are errors, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Choice(StrEnum):
    """Base of what a request chooses from, by name."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Choice], handler: GetCoreSchemaHandler) -> CoreSchema:
        names_come_as_plain_strings = {"strict": False}
        return cast(CoreSchema, {**handler(source), **names_come_as_plain_strings})


class Order(Choice):
    """In which order a cycle visits the chunks; chunk 0 is the start of the stream (the embedding)."""

    DESCENDING = "descending"
    ASCENDING = "ascending"
    RANDOM = "random"


class Precision(Choice):
    """Data type of the weights and of the computation."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return 4 if self is Precision.FP32 else 2


class Optimizer(Choice):
    """Which rule updates the active chunk."""

    ADAMW = "adamw"
    ADAMW8BIT = "adamw8bit"
    """AdamW with ``state_dtype: int8``."""
    ADAFACTOR = "adafactor"
    LION = "lion"
    SGD = "sgd"
    ADAGRAD = "adagrad"
    RMSPROP = "rmsprop"


class StateDtype(Choice):
    """How optimizer states are stored; they are computed in fp32."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    """8-bit codes, and an fp32 scale per 256 of them."""


class Master(Choice):
    """What keeps the precision that bf16 weights lack."""

    NONE = "none"
    FP32 = "fp32"
    RESIDUAL = "residual"


class ScheduleSpec(SpecModel):
    """Which chunk is active at which optimizer update, and where its optimizer states live."""

    num_chunks: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    order: Order = Order.DESCENDING
    switch_every: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """Optimizer updates per visit of a chunk."""
    states: Literal["keep", "reset"] = "keep"
    """``keep``: states live in host memory between visits; ``reset``: they start from zero at every visit."""
    state_dtype: StateDtype = StateDtype.FP32
    """bf16 and int8 states are rounded stochastically. The optimizer ``adamw8bit`` has int8 states."""
    master: Master = Master.NONE
    """For bf16 weights. ``none``: updated in fp32, rounded stochastically. ``fp32``: an fp32 copy for as long as the
    chunk is visited. ``residual``: an exact fp32 master, whose low 16 bits are kept on the host for ever."""
    expansion: Literal["none", "factored"] = "none"
    """``factored``: parameters above the active chunk take a step too, in backward, with factored second moments."""


class CheckpointedLayers(SpecModel):
    """Checkpoint only the named layers (indices into the model's layer list)."""

    layers: list[Annotated[int, Field(ge=0)]]


class LoraSpec(SpecModel):
    """Low-rank adapters (arXiv 2106.09685): y = W x + alpha / rank · B A x, where only A and B are trained, in fp32."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the adapters' input."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1, max_length=1000)] = "all-linear"
    """``all-linear``: every linear layer but the head; or names of modules, such as ``q_proj``."""
    lr_ratio: Annotated[float, Field(gt=0, le=1e4)] = 1.0
    """B's learning rate over A's (LoRA+, arXiv 2402.12354, which advises about 16); 1 is plain LoRA."""


class TrainingSpec(SpecModel):
    """Everything about a training step that decides its memory and its time."""

    method: Literal["chunkft", "full", "lora"] = "chunkft"
    """``full`` and ``lora`` are the schedule with one chunk: of all parameters, or of adapters on frozen weights."""
    seq_len: Annotated[int, Field(ge=1, le=10_000_000)] = 1024
    micro_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    packing: bool = False
    """Short rows share a sequence of ``seq_len`` tokens without seeing each other."""
    precision: Precision = Precision.BF16
    """Of the weights, and of the computation where ``autocast`` does not say otherwise. fp16 scales the loss."""
    autocast: Literal["none", "bf16", "fp16"] = "none"
    """For fp32 weights: data type of matrix products and the like."""
    optimizer: Optimizer = Optimizer.ADAMW
    activation_checkpointing: Literal["full", "none"] | CheckpointedLayers = "full"
    loss: Literal["fused", "standard"] = "fused"
    attention: Literal["sdpa", "eager"] = "sdpa"
    weights: Literal["resident"] = "resident"
    schedule: Literal["auto"] | ScheduleSpec = Field(default_factory=ScheduleSpec)
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the active chunk's gradients to this total norm; ``null`` turns clipping off."""
    update_in_backward: bool = False
    """Update each slice as soon as its gradient is complete, and free it: a chunk's gradients never exist together."""
    lora: LoraSpec | None = None
    """Of method ``lora``, which takes the defaults where nothing is given."""

    @model_validator(mode="after")
    def _expansion_has_no_residuals(self) -> TrainingSpec:
        if self.schedule == "auto" or self.schedule.expansion == "none":
            return self
        if self.schedule.master is Master.RESIDUAL:
            raise ValueError("expansion 'factored' would leave residual masters behind: use master 'none' or 'fp32'")
        return self

    @model_validator(mode="after")
    def _update_in_backward_is_possible(self) -> TrainingSpec:
        if self.update_in_backward and self.max_grad_norm is not None:
            raise ValueError("update_in_backward never sees the whole chunk's gradient norm: set max_grad_norm to null")
        if self.update_in_backward and self.gradient_accumulation_steps > 1:
            raise ValueError("update_in_backward updates in every backward pass: use gradient_accumulation_steps 1")
        return self

    @model_validator(mode="after")
    def _states_fit_the_optimizer(self) -> TrainingSpec:
        if self.schedule == "auto":
            return self
        asked = self.schedule.state_dtype if "state_dtype" in self.schedule.model_fields_set else None
        try:
            resolved = resolved_state_dtype(self.optimizer, asked)
        except InputError as error:
            raise ValueError(f"schedule.state_dtype: {error.message}") from error
        if resolved is not self.schedule.state_dtype:
            object.__setattr__(self, "schedule", self.schedule.model_copy(update={"state_dtype": resolved}))
        return self

    @model_validator(mode="after")
    def _fp16_is_possible(self) -> TrainingSpec:
        if self.autocast != "none" and self.precision is not Precision.FP32:
            raise ValueError("autocast is for fp32 weights: use precision 'fp32', or autocast 'none'")
        if self.precision is not Precision.FP16 and self.autocast != "fp16":
            return self
        if self.update_in_backward:
            raise ValueError("update_in_backward comes before fp16 can tell whether a gradient overflowed: use bf16")
        if self.schedule != "auto" and self.schedule.expansion != "none":
            raise ValueError("expansion updates in backward, before fp16 can tell of an overflow: use bf16")
        if self.schedule != "auto" and self.schedule.master is Master.RESIDUAL:
            raise ValueError("master 'residual' is exact for bf16 weights only: use 'fp32' or 'none' with fp16")
        return self

    @property
    def compute_precision(self) -> Precision:
        """Data type of matrix products."""
        return self.precision if self.autocast == "none" else Precision(self.autocast)

    @property
    def scales_loss(self) -> bool:
        """True when gradients are computed in fp16, and checked for overflow."""
        return Precision.FP16 in (self.precision, self.autocast)

    @model_validator(mode="after")
    def _masters_are_for_bf16(self) -> TrainingSpec:
        is_asked = self.schedule != "auto" and self.schedule.master is not Master.NONE
        if is_asked and self.precision is Precision.FP32:
            raise ValueError("fp32 weights are their own master: use schedule.master 'none' with precision 'fp32'")
        return self

    @model_validator(mode="after")
    def _one_chunk(self) -> TrainingSpec:
        if self.method != "chunkft" and self.schedule != "auto" and self.schedule.num_chunks != 1:
            # These methods are the schedule with one chunk: an explicit other count contradicts the method.
            if "schedule" in self.model_fields_set and "num_chunks" in self.schedule.model_fields_set:
                raise ValueError(
                    f"method '{self.method}' is the schedule with num_chunks 1; use method 'chunkft' for more"
                )
            object.__setattr__(self, "schedule", self.schedule.model_copy(update={"num_chunks": 1}))
        return self

    @model_validator(mode="after")
    def _adapters_belong_to_lora(self) -> TrainingSpec:
        if self.method != "lora":
            if self.lora is not None:
                raise ValueError(f"lora is given, but the method is '{self.method}': use method 'lora'")
            return self
        if self.lora is None:
            object.__setattr__(self, "lora", LoraSpec())
        if self.schedule != "auto" and self.schedule.master is not Master.NONE:
            raise ValueError("adapters are fp32, their own master: use schedule.master 'none' with method 'lora'")
        if self.schedule != "auto" and self.schedule.expansion != "none":
            raise ValueError("method 'lora' trains nothing above its one chunk: use schedule.expansion 'none'")
        return self

    @property
    def trained_precision(self) -> Precision:
        """Data type of what is trained: the weights, or adapters."""
        return Precision.FP32 if self.method == "lora" else self.precision


def resolved_state_dtype(optimizer: Optimizer, asked: StateDtype | None) -> StateDtype:
    """How an optimizer's states are stored when the user asked for this, or for nothing.

    Raises:
        InputError: the two contradict each other.
    """
    if optimizer is Optimizer.ADAMW8BIT and asked not in (None, StateDtype.INT8):
        raise InputError(
            "training.schedule.state_dtype", f"'adamw8bit' is AdamW with int8 states: use 'adamw' for {asked}"
        )
    if optimizer is Optimizer.ADAFACTOR and asked not in (None, StateDtype.FP32):
        raise InputError(
            "training.schedule.state_dtype", "'adafactor' keeps a row and a column of fp32 per matrix: use 'fp32'"
        )
    return asked or (StateDtype.INT8 if optimizer is Optimizer.ADAMW8BIT else StateDtype.FP32)


def default_schedule(optimizer: Optimizer, num_chunks: int) -> ScheduleSpec:
    """A schedule that asks for nothing but its number of chunks."""
    return ScheduleSpec(num_chunks=num_chunks, state_dtype=resolved_state_dtype(optimizer, None))


class JobTraining(TrainingSpec):
    """A training spec plus what does not change memory: rates, length, seed."""

    learning_rate: Annotated[float, Field(gt=0, le=10)] = 2e-5
    expansion_learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    """Of parameters outside the active chunk, with ``expansion: factored``; default a third of ``learning_rate``."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    lr_schedule_by: Literal["cycle", "update"] = "cycle"
    """``cycle``: every chunk sees the same rates; ``update``: the rate changes with every update."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the cycles, or updates, in which the rate rises."""
    weight_decay: Annotated[float, Field(ge=0, lt=10)] = 0.0
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer updates; exactly one of ``max_steps`` and ``epochs``; default one epoch."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    eval_every: Annotated[int, Field(ge=1)] | None = None
    """Updates between evaluations; the start and the end are always evaluated when there is held-out data."""
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    """Updates between checkpoints; default one cycle."""
    checkpoints_to_keep: Annotated[int, Field(ge=1, le=1000)] = 2
    """The newest ones, while the job runs; when it has succeeded, the exported model is what stays."""

    @model_validator(mode="after")
    def _one_length(self) -> JobTraining:
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("give max_steps or epochs, not both")
        return self


class ModelPath(SpecModel):
    """A local Hugging Face folder (config.json; safetensors for training)."""

    path: Annotated[str, Field(min_length=1, max_length=4096)]


class ModelConfig(SpecModel):
    """An architecture given inline: the content of a Hugging Face config.json."""

    config: dict[str, Any]


ModelRef = Annotated[str, Field(min_length=1, max_length=256)] | ModelPath | ModelConfig


class DatasetSpec(SpecModel):
    """Training data: a local file (``path``) or an uploaded one (``file_id``)."""

    path: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    file_id: str | None = None
    format: Literal["auto", "messages", "prompt_completion", "instruction", "text"] = "auto"
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of rows held out for evaluation, from the end of a seeded shuffle; 0 where there is validation data."""
    validation_path: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Rows of a file of their own to evaluate on, in the same format, instead of a share of the others."""
    validation_file_id: str | None = None
    """The same, of an uploaded file."""

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
        if self.has_validation and self.eval_fraction > 0:
            if "eval_fraction" in self.model_fields_set:
                raise ValueError("eval_fraction holds out rows where there is no validation file: leave it out")
            object.__setattr__(self, "eval_fraction", 0.0)
        return self


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
    """A catalog id, an inline GPU, a kind of device (``cpu``, ``cuda``), or a device of the server (``cuda:1``);
    default: what the machine has."""
    training: JobTraining = Field(default_factory=JobTraining)
    dataset: DatasetSpec
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


class RunSpec(SpecModel):
    """One resolved job as the engine runs it (the worker's job.json): local paths, a fixed schedule, a device."""

    job_id: str
    name: str
    model_path: str
    model_name: str = ""
    """For the model card and adapters: a Hugging Face name where there is one; default: the folder's name."""
    dataset_path: str
    dataset_name: str = ""
    """For the model card; default: the file's name."""
    dataset_format: Literal["auto", "messages", "prompt_completion", "instruction", "text"] = "auto"
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    validation_path: str | None = None
    """Evaluated on instead of held-out rows."""
    training: JobTraining
    output_name: str
    merge: bool = False
    predicted_peak_bytes: int | None = None
    """Allocated bytes at the peak as planned; for the model card."""
    device: str = "cpu"
    """``cpu`` or ``cuda:N``."""


def validation_field(location: tuple[int | str, ...]) -> str:
    """Dotted field name of a pydantic error location, without the union-branch labels that pydantic inserts."""
    labels = {"ScheduleSpec", "ModelPath", "ModelConfig", "CheckpointedLayers", "constrained-str", "body", "GpuSpec"}
    parts = [str(part) for part in location]
    return ".".join(p for p in parts if p not in labels and not p.startswith(("literal[", "function-", "dict[")))


Spec = TypeVar("Spec", bound=BaseModel)


def parse(spec: type[Spec], value: object) -> Spec:
    """Validate ``value`` (a dict or JSON text) against ``spec``.

    Raises:
        InputError: names the first offending field and what it should be.
    """
    try:
        if isinstance(value, str | bytes):
            return spec.model_validate_json(value)
        return spec.model_validate(value)
    except ValidationError as error:
        first = deepest_error(error)
        raise InputError(first[0], first[1]) from error


def deepest_error(error: ValidationError) -> tuple[str, str]:
    """(field, message) of the error that says most: in a union, the branch that got furthest into the value."""
    best = max(error.errors(include_url=False), key=lambda item: len(item["loc"]))
    message = best["msg"].removeprefix("Value error, ")
    given = best.get("input")
    if isinstance(given, str | int | float) and not isinstance(given, bool) and len(str(given)) <= 100:
        message = f"{message} (got {given!r})"
    return validation_field(best["loc"]) or "request", message
