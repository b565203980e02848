"""ChunkFT for one's own training loop: ``tuner.backward(batch)``, ``tuner.step()``.

Example:
    tuner = ChunkFT(model, num_chunks=16, lr=2e-5)
    for batch in loader:
        tuner.backward(batch)
        tuner.step()
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic.fields import FieldInfo
from torch import Tensor, nn

from chunkplan.engine.errors import InputError
from chunkplan.engine.gradients.activation import Activation, ActiveSlice
from chunkplan.engine.model.adapters import adapter_rate_factor
from chunkplan.engine.model.loading import DTYPES
from chunkplan.engine.model.tasks import Task, task_of
from chunkplan.engine.optimizer.chunk_optimizer import ChunkOptimizer, OptimizerConfig
from chunkplan.engine.optimizer.expansion import Expansion
from chunkplan.engine.optimizer.loss_scale import LossScale
from chunkplan.engine.spec import Precision, ResolvedTraining, ScheduleSpec, StepSpec, TrainingSpec, parse
from chunkplan.engine.stream.parameters import ParameterStream
from chunkplan.engine.stream.schedule import Schedule, Visit
from chunkplan.engine.training.step import (
    Observer,
    Unobserved,
    check_fused_loss,
    check_packing,
    forward_backward,
    num_counted_tokens,
    prepared,
)

_OF_A_JOB = {"method", "seq_len", "micro_batch_size", "gradient_accumulation_steps"}
_OF_THE_MODEL = {"precision", "attention", "lora"}
_NO_OPTIONS = _OF_A_JOB | _OF_THE_MODEL | {"schedule"}
"""Fields of a training spec that a loop of one's own decides by its batches and model; others are options."""
_DEFAULTS: dict[str, Any] = {"activation_checkpointing": "none"}
"""Defaults that differ from a job's: a model is left as it is unless asked otherwise."""


def options() -> dict[str, FieldInfo]:
    """Return the keyword options of :class:`ChunkFT` that training specs have too, by name."""
    of_step = {name: field for name, field in TrainingSpec.model_fields.items() if name not in _NO_OPTIONS}
    of_schedule = {name: field for name, field in ScheduleSpec.model_fields.items() if name != "num_chunks"}
    return of_schedule | of_step


class ChunkFT:
    """Full fine-tuning, one chunk of the parameter stream at a time (arXiv 2605.21177).

    Args:
        model: a language model of transformers, unmodified: causal, masked or encoder-decoder.
        num_chunks: 1 is dense full fine-tuning.
        lr: learning rate, or a function of the number of the update (from 0).
        weight_decay: decoupled: weights shrink by ``lr * weight_decay`` at every update.
        betas: decay of the rule's moments; default: what is usual for it.
        eps: keeps the rule from dividing by zero.
        expansion_lr: learning rate, like ``lr``, of what ``expansion`` updates; default a third of it.
        parameters: ``all``, or only those that are ``trainable`` when the tuner is made; the others stay
            frozen.
        rate_factor: a parameter's learning rate over ``lr``, by its name.
        seed: decides random orders and stochastic rounding.
        observer: is told the phases of each step.
        options: the fields of :class:`chunkplan.engine.spec.ScheduleSpec` and of
            :class:`chunkplan.engine.spec.StepSpec`, with the same values and the same refusals; only
            ``activation_checkpointing`` has another default, ``none``. :func:`options` lists them.

    Raises:
        InputError: an option that this model cannot be trained with, or two that do not go together.
    """

    def __init__(
        self,
        model: nn.Module,
        num_chunks: int = 16,
        lr: float | Callable[[int], float] = 2e-5,
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        expansion_lr: float | Callable[[int], float] | None = None,
        parameters: Literal["all", "trainable"] = "all",
        rate_factor: Callable[[str], float] | None = None,
        seed: int = 0,
        observer: Observer | None = None,
        **options: Any,
    ) -> None:
        training = _training_of(model, num_chunks, options)
        config = OptimizerConfig.of(training, weight_decay=weight_decay, betas=betas, eps=eps, seed=seed)
        self._begin(model, training, config, lr, expansion_lr, parameters, rate_factor, observer)

    @classmethod
    def of(
        cls,
        training: TrainingSpec,
        model: nn.Module,
        lr: float | Callable[[int], float] = 2e-5,
        *,
        weight_decay: float = 0.0,
        expansion_lr: float | Callable[[int], float] | None = None,
        seed: int = 0,
        observer: Observer | None = None,
    ) -> Self:
        """Return the tuner that a training spec asks for; with method ``lora``, the model has its
        adapters.
        """
        tuner, training = cls.__new__(cls), training.resolved()
        config = OptimizerConfig.of(training, weight_decay=weight_decay, seed=seed)
        parameters: Literal["all", "trainable"] = "all" if training.lora is None else "trainable"
        rate_factor = None if training.lora is None else partial(adapter_rate_factor, training.lora)
        tuner._begin(model, training, config, lr, expansion_lr, parameters, rate_factor, observer)
        return tuner

    def _begin(
        self,
        model: nn.Module,
        training: ResolvedTraining,
        config: OptimizerConfig,
        lr: float | Callable[[int], float],
        expansion_lr: float | Callable[[int], float] | None,
        parameters: Literal["all", "trainable"],
        rate_factor: Callable[[str], float] | None,
        observer: Observer | None,
    ) -> None:
        _check_replicas(model)
        if training.loss == "fused":
            check_fused_loss(model)
        if training.packing:
            check_packing(model, training)
        schedule = training.schedule
        self.options: StepSpec = training
        self.model = model
        self.task = task_of(model)
        self.stream = ParameterStream(model, only_trainable=parameters == "trainable")
        self.chunks = self.stream.partition(schedule.num_chunks)
        self.schedule = Schedule(schedule.num_chunks, schedule.order, schedule.switch_every, config.seed)
        self.optimizer = ChunkOptimizer(config, rate_factor=rate_factor)
        self.num_updates = 0
        self.loss_scale = LossScale() if training.scales_loss else None
        self.was_skipped = False
        # Rates must not refer to the tuner: a cycle would keep its states alive until the collector comes by.
        self.lr = rate = _rate(lr)
        self.expansion: Expansion | None = None
        if schedule.expansion == "factored":
            self.expansion = Expansion(model.named_parameters(), seed=config.seed)
        self.expansion_lr = _rate(expansion_lr) if expansion_lr is not None else lambda update: rate(update) / 3
        self._has_expanded = False
        self._observer = observer or Unobserved()
        self._activation: Activation | None = None
        self._active: list[ActiveSlice] = []
        self._prepared = ExitStack()
        self._prepared.enter_context(prepared(model, self.options))

    @property
    def visit(self) -> Visit:
        """The visit that the next update belongs to."""
        return self.schedule.visit(self.num_updates)

    @property
    def active(self) -> list[ActiveSlice]:
        """The active chunk's slices; activates the chunk that is due."""
        if self._activation is None:
            on_gradient = self.optimizer.update_slice if self.options.update_in_backward else None
            chunk = self.chunks[self.visit.chunk_index]
            self._activation = Activation(self.stream, chunk, self.expansion, on_gradient)
            self._active = self._activation.__enter__()
        return self._active

    def backward(
        self, batch: Mapping[str, Tensor], denominator: float | None = None, *, is_last: bool = True
    ) -> Tensor:
        """Forward and backward of one micro-batch on the active chunk; gradients add up until :meth:`step`.

        Args:
            batch: ``input_ids`` and ``labels``, [batch, sequence], on the model's device. For causal models,
                an ``attention_mask`` that pads on the right may come along: causal attention never looks
                there; with packing, ``position_ids`` instead. Masked models take any ``attention_mask`` and
                ``token_type_ids``, encoder-decoder models an encoder's ``attention_mask``,
                ``decoder_input_ids`` and ``decoder_attention_mask``.
            denominator: what the summed token loss is divided by: counted tokens of all micro-batches of the
                update. Default: of this one.
            is_last: no micro-batch of this update follows. Matters with expansion only, whose steps happen in
                backward: all micro-batches of an update must see the same weights.

        Returns:
            The detached loss, a scalar.

        Raises:
            InputError: the batch holds something else that would change the result, or it comes after weights
                were already updated in the backward pass of a batch before it.
        """
        _check_batch(batch, self.task, packing=self.options.packing)
        if denominator is None:
            denominator = max(num_counted_tokens(batch["labels"], self.task), 1)
        assert self.active
        self._prepare_updates(is_last)
        scale = self._scale
        loss = forward_backward(self.model, batch, denominator / scale, self.options, self._observer)
        return loss if scale == 1.0 else loss / scale

    @property
    def _scale(self) -> float:
        return 1.0 if self.loss_scale is None else self.loss_scale.scale

    def _prepare_updates(self, is_last: bool) -> None:
        """Updates that will happen within the backward pass that comes now."""
        if self._has_expanded or self.optimizer.is_updating:
            in_backward = self.options.update_in_backward
            fix = "use update_in_backward=False" if in_backward else "pass is_last=False for those before"
            raise InputError("batch", f"weights were updated in the backward pass of a micro-batch before it: {fix}")
        if self.options.update_in_backward:
            self.optimizer.begin(self.visit, self.lr(self.num_updates))
        if self.expansion is not None and self._activation is not None:
            self.expansion.learning_rate = self.expansion_lr(self.num_updates)
            self._activation.expand(is_last)
            self._has_expanded = is_last

    def step(self) -> float | None:
        """Update the active chunk, move on when it is time, and return the gradient norm before clipping.

        In fp16, gradients that overflowed skip the update: :attr:`was_skipped` says so, and there is no norm.
        """
        visit, scale = self.visit, self._scale
        norm: float | None = None
        with self._observer.phase("optimizer"):
            self.was_skipped = self.loss_scale is not None and not self.loss_scale.accepts(self.active)
            if self.was_skipped:
                self.optimizer.skip(self.active, visit)
            elif self.optimizer.is_updating:
                self.optimizer.finish(self.active)
            else:
                norm = self.optimizer.update(self.active, visit, self.lr(self.num_updates), scale)
        self.num_updates += 1
        self._has_expanded = False
        if visit.is_last:
            self._leave_chunk()
        return norm

    def _leave_chunk(self) -> None:
        if self._activation is not None:
            self._active = []
            self._activation.__exit__()
            self._activation = None

    def close(self) -> None:
        """Give the model back as it was: no active chunk, no wrapped layers."""
        self._leave_chunk()
        self._prepared.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _training_of(model: nn.Module, num_chunks: int, given: Mapping[str, Any]) -> ResolvedTraining:
    """The training spec that options of a loop of one's own stand for.

    Raises:
        TypeError: there is no such option.
        InputError: an option has a wrong value, or does not go with another, or with the model's data type.
    """
    known = options()
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"ChunkFT has no option {name!r}{hint}")
    values = _DEFAULTS | dict(given)
    schedule = {name: values.pop(name) for name in ScheduleSpec.model_fields if name in values}
    asked = {
        **values,
        "precision": _precision(model),
        "schedule": {**schedule, "num_chunks": operator.index(num_chunks)},
    }
    try:
        return parse(TrainingSpec, asked).resolved()
    except InputError as error:
        raise InputError(f"training.{error.field}", error.message) from error


def _precision(model: nn.Module) -> Precision:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return next((precision for precision, dtype in DTYPES.items() if dtype in dtypes), Precision.FP32)


def _signature() -> inspect.Signature:
    """What ``help(ChunkFT)`` shows: its own parameters, and every option with its type and default."""
    own = list(inspect.signature(ChunkFT.__init__).parameters.values())[1:-1]
    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_DEFAULTS.get(name, field.get_default(call_default_factory=True)),
            annotation=field.annotation,
        )
        for name, field in options().items()
    ]
    return inspect.Signature([*own, *shared])


ChunkFT.__signature__ = _signature()  # type: ignore[attr-defined]


def _check_replicas(model: nn.Module) -> None:
    replicas = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, replicas) or (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        raise InputError("model", "ChunkFT trains in one process: replicas would not share their gradients")


def _rate(given: float | Callable[[int], float]) -> Callable[[int], float]:
    """A learning rate as a function of the update's number."""
    return given if callable(given) else lambda _: given


def _check_batch(batch: Mapping[str, Tensor], task: Task, *, packing: bool) -> None:
    if packing and "attention_mask" in batch:
        raise InputError("batch.attention_mask", "cannot come with packing: position_ids tell the rows apart")
    if packing != ("position_ids" in batch):
        problem = "is missing, which packing tells rows apart by" if packing else "needs the option packing"
        raise InputError("batch.position_ids", problem)
    unknown = sorted(set(batch) - task.batch_keys)
    if unknown:
        raise InputError(f"batch.{unknown[0]}", f"is not used in training; give {', '.join(sorted(task.batch_keys))}")
    mask = batch.get("attention_mask") if task is Task.CAUSAL else None
    if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise InputError("batch.attention_mask", "must pad on the right; set the tokenizer's padding_side to 'right'")
