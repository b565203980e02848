"""The training spec: everything about a step that decides its memory and its time, and what a job
adds to it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec.base import Choice, SpecModel


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
    """For bf16 weights. ``none``: updated in fp32, rounded stochastically. ``fp32``: an fp32 copy for as long
    as the chunk is visited. ``residual``: an exact fp32 master, whose low 16 bits are kept on the host for
    ever."""
    expansion: Literal["none", "factored"] = "none"
    """``factored``: parameters above the active chunk take a step too, in backward, with factored second
    moments."""


class CheckpointedLayers(SpecModel):
    """Checkpoint only the named layers (indices into the model's layer list)."""

    layers: list[Annotated[int, Field(ge=0)]]


class LoraSpec(SpecModel):
    """Low-rank adapters (arXiv 2106.09685): y = W x + alpha / rank · B A x, where only A and B are trained,
    in fp32.
    """

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
    """``full`` and ``lora`` are the schedule with one chunk: of all parameters, or of adapters on frozen
    weights."""
    seq_len: Annotated[int, Field(ge=1, le=10_000_000)] = 1024
    micro_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    packing: bool = False
    """Short rows share a sequence of ``seq_len`` tokens without seeing each other."""
    precision: Precision = Precision.BF16
    """Of the weights, and of the computation where ``autocast`` does not say otherwise. fp16 scales the loss.
    """
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
    """Update each slice as soon as its gradient is complete, and free it: a chunk's gradients never exist
    together."""
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
    """Of parameters outside the active chunk, with ``expansion: factored``; default a third of
    ``learning_rate``."""
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


ResolvedSchedule = ScheduleSpec
ResolvedTraining = TrainingSpec
