"""The training spec: all that decides a step's memory and time, and what a job adds to it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from chunkplan.engine.spec.base import SpecModel
from chunkplan.engine.spec.choices import Precision
from chunkplan.engine.spec.refusals import refusal_of
from chunkplan.engine.spec.schedule import ResolvedSchedule, ScheduleSpec
from chunkplan.engine.spec.step import StepSpec


class LoraSpec(SpecModel):
    """Low-rank adapters (arXiv 2106.09685): y = W x + alpha / rank · B A x, of which A and B are trained."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank of the adapters."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 32.0
    """The adapters' output is scaled by ``alpha`` / ``rank``."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapters' input that is dropped."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1, max_length=1000)] = "all-linear"
    """``all-linear``: every linear layer but the head; or names of modules, such as ``q_proj``."""
    lr_ratio: Annotated[float, Field(gt=0, le=1e4)] = 1.0
    """B's learning rate over A's (LoRA+, arXiv 2402.12354, which advises about 16); 1 is plain LoRA."""


class TrainingSpec(StepSpec):
    """Everything about a training step that decides its memory and its time, as it is asked for.

    What is left open here is decided in :meth:`resolved`; what does not go together is in
    :mod:`chunkplan.engine.spec.refusals`.
    """

    method: Literal["chunkft", "full", "lora"] = "chunkft"
    """``full`` and ``lora`` have one chunk: of all parameters, or of adapters on frozen weights."""
    seq_len: Annotated[int, Field(ge=1, le=10_000_000)] = 1024
    """Tokens per sequence."""
    micro_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """Sequences per forward pass."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """Micro-batches per update."""
    precision: Precision = Precision.BF16
    """Data type of the weights (bf16, fp16 or fp32), and of the computation but for ``autocast``."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """How attention is computed: sdpa or eager."""
    weights: Literal["resident"] = "resident"
    """Where the weights are: ``resident`` on the device."""
    schedule: Literal["auto"] | ScheduleSpec = Field(default_factory=ScheduleSpec)
    """Which chunk is active when; ``auto`` searches for the fastest schedule that fits."""
    lora: LoraSpec | None = None
    """Adapters of method ``lora``, which takes the defaults where nothing is given."""

    @model_validator(mode="after")
    def _goes_together(self) -> TrainingSpec:
        refusal = refusal_of(self)
        if refusal is not None:
            raise PydanticCustomError("refused", refusal.message, {"field": refusal.field})
        return self

    @property
    def asked_schedule(self) -> ScheduleSpec:
        """The schedule as far as it is given: one that asks for nothing where it is ``auto``."""
        return ScheduleSpec() if self.schedule == "auto" else self.schedule

    @property
    def has_one_chunk(self) -> bool:
        """True for the methods that train everything at once."""
        return self.method != "chunkft"

    @property
    def compute_precision(self) -> Precision:
        """Data type of matrix products."""
        return self.precision if self.autocast == "none" else Precision(self.autocast)

    @property
    def trained_precision(self) -> Precision:
        """Data type of what is trained: the weights, or adapters."""
        return Precision.FP32 if self.method == "lora" else self.precision

    @property
    def scales_loss(self) -> bool:
        """True when gradients are computed in fp16, and checked for overflow."""
        return Precision.FP16 in (self.precision, self.autocast)

    def resolved(self, schedule: ScheduleSpec | None = None) -> ResolvedTraining:
        """Return the spec with everything decided.

        Args:
            schedule: the one to take; default: the spec's own, which must not be ``auto``.
        """
        return ResolvedTraining.model_validate(self._decided(schedule))

    def normalised(self) -> Self:
        """Return the same request with every default written out; one with a fixed schedule is resolved."""
        if self.schedule != "auto":
            return cast(Self, self.resolved())
        return self.model_copy(update={"lora": self._adapters})

    @property
    def _adapters(self) -> LoraSpec | None:
        return self.lora or LoraSpec() if self.method == "lora" else None

    def _decided(self, schedule: ScheduleSpec | None) -> dict[str, Any]:
        asked = self.schedule if schedule is None else schedule
        assert asked != "auto", "the planner resolves 'auto' before anything runs"
        decided = asked.resolved(self.optimizer, has_one_chunk=self.has_one_chunk)
        return dict(self) | {"schedule": decided, "lora": self._adapters}


class ResolvedTraining(TrainingSpec):
    """A training spec that can run: its schedule is fixed, and nothing in it is left to be decided."""

    schedule: ResolvedSchedule = Field(default_factory=ResolvedSchedule)
    """Which chunk is active when."""


AskedTraining = Annotated[TrainingSpec, AfterValidator(lambda training: training.normalised())]
"""A request's field: what is asked for comes out with its defaults written out."""


class JobTraining(TrainingSpec):
    """A training spec plus what does not change memory: rates, length, seed."""

    learning_rate: Annotated[float, Field(gt=0, le=10)] = 2e-5
    """Learning rate at its highest."""
    expansion_learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    """Learning rate of what ``expansion`` updates; default a third of ``learning_rate``."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the rate falls: constant, linear or cosine."""
    lr_schedule_by: Literal["cycle", "update"] = "cycle"
    """``cycle``: every chunk sees the same rates; ``update``: the rate changes with every update."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the cycles, or updates, in which the rate rises."""
    weight_decay: Annotated[float, Field(ge=0, lt=10)] = 0.0
    """Decoupled weight decay."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer updates; exactly one of ``max_steps`` and ``epochs``; default one epoch."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides the split, the order of the data, and stochastic rounding."""
    eval_every: Annotated[int, Field(ge=1)] | None = None
    """Updates between evaluations; the start and the end are always evaluated when there is held-out data."""
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    """Updates between checkpoints; default one cycle."""
    checkpoints_to_keep: Annotated[int, Field(ge=1, le=1000)] = 2
    """How many of the newest stay while the job runs; after success the exported model is what stays."""

    @model_validator(mode="after")
    def _one_length(self) -> JobTraining:
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("give max_steps or epochs, not both")
        return self

    def resolved(self, schedule: ScheduleSpec | None = None) -> ResolvedJobTraining:
        """Return the spec with everything decided; see :meth:`TrainingSpec.resolved`."""
        return ResolvedJobTraining.model_validate(self._decided(schedule))


class ResolvedJobTraining(JobTraining, ResolvedTraining):
    """A job's training spec that can run."""

    schedule: ResolvedSchedule = Field(default_factory=ResolvedSchedule)
    """Which chunk is active when."""


AskedJobTraining = Annotated[JobTraining, AfterValidator(lambda training: training.normalised())]
"""A job request's field: what is asked for comes out with its defaults written out."""
