"""ChunkFT for one's own training loop: ``tuner.backward(batch)``, ``tuner.step()``.

Example:
    tuner = ChunkFT(model, num_chunks=16, lr=2e-5)
    for batch in loader:
        tuner.backward(batch)
        tuner.step()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor, nn

from chunkplan.engine.errors import InputError
from chunkplan.engine.gradients.activation import Activation, ActiveSlice
from chunkplan.engine.model.adapters import adapter_rate_factor
from chunkplan.engine.model.tasks import Task, task_of
from chunkplan.engine.optimizer.chunk_optimizer import ChunkOptimizer, OptimizerConfig
from chunkplan.engine.optimizer.expansion import Expansion
from chunkplan.engine.optimizer.loss_scale import LossScale
from chunkplan.engine.optimizer.rules import DEFAULT_BETAS
from chunkplan.engine.spec import (
    CheckpointedLayers,
    Master,
    Optimizer,
    Order,
    StateDtype,
    TrainingSpec,
    resolved_state_dtype,
)
from chunkplan.engine.stream.parameters import ParameterStream
from chunkplan.engine.stream.schedule import Schedule, Visit
from chunkplan.engine.training.step import (
    Observer,
    StepOptions,
    Unobserved,
    check_fused_loss,
    check_packing,
    forward_backward,
    num_counted_tokens,
    prepared,
)


class ChunkFT:
    """Full fine-tuning, one chunk of the parameter stream at a time (arXiv 2605.21177).

    Args:
        model: a language model of transformers, unmodified: causal, masked or encoder-decoder.
        num_chunks: 1 is dense full fine-tuning.
        lr: learning rate, or a function of the number of the update (from 0).
        order: in which order a cycle visits the chunks.
        switch_every: optimizer updates per visit.
        states: ``keep`` optimizer states in host memory between visits, or ``reset`` them.
        state_dtype: how states are stored; they are computed in fp32. Default: fp32, int8 for ``adamw8bit``.
        master: what keeps the precision that bf16 weights lack, see
            :class:`chunkplan.engine.spec.ScheduleSpec`.
        optimizer: the update rule.
        betas: of the rule; default: what is usual for it.
        max_grad_norm: clip the active chunk's gradient norm; None turns it off.
        update_in_backward: update each slice as soon as its gradient is complete, and free it; takes
            ``max_grad_norm`` None and one backward pass per update.
        loss: ``fused`` never materialises the logits; ``standard`` is the model's own.
        activation_checkpointing: ``full``, ``none``, or chosen layers.
        autocast: data type of matrix products and the like; the weights are fp32.
        packing: rows share sequences, told apart by a batch's ``position_ids``, which start from 0 at every
            row.
        expansion: ``factored``: parameters above the active chunk take a step too, see
            :mod:`chunkplan.engine.optimizer.expansion`.
        expansion_lr: their learning rate, like ``lr``; default a third of it.
        parameters: ``all``, or only those that are ``trainable`` when the tuner is made; the others stay
            frozen.
        rate_factor: a parameter's learning rate over ``lr``, by its name.
        observer: is told the phases of each step.

    Raises:
        InputError: an option that this model cannot be trained with.
    """

    def __init__(
        self,
        model: nn.Module,
        num_chunks: int = 16,
        lr: float | Callable[[int], float] = 2e-5,
        *,
        order: Order | Literal["descending", "ascending", "random"] = Order.DESCENDING,
        switch_every: int = 1,
        states: Literal["keep", "reset"] = "keep",
        state_dtype: StateDtype | Literal["fp32", "bf16", "int8"] | None = None,
        master: Master | Literal["none", "fp32", "residual"] = Master.NONE,
        optimizer: Optimizer
        | Literal["adamw", "adamw8bit", "adafactor", "lion", "sgd", "adagrad", "rmsprop"] = Optimizer.ADAMW,
        weight_decay: float = 0.0,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        max_grad_norm: float | None = 1.0,
        update_in_backward: bool = False,
        loss: Literal["fused", "standard"] = "fused",
        activation_checkpointing: Literal["full", "none"] | CheckpointedLayers = "none",
        packing: bool = False,
        autocast: Literal["none", "bf16", "fp16"] = "none",
        expansion: Literal["none", "factored"] = "none",
        expansion_lr: float | Callable[[int], float] | None = None,
        parameters: Literal["all", "trainable"] = "all",
        rate_factor: Callable[[str], float] | None = None,
        seed: int = 0,
        observer: Observer | None = None,
    ) -> None:
        _check_replicas(model)
        if update_in_backward and max_grad_norm is not None:
            raise InputError("max_grad_norm", "must be None: update_in_backward never sees the whole chunk's norm")
        if loss == "fused":
            check_fused_loss(model)
        self.options = StepOptions(loss, activation_checkpointing, autocast)
        self.packing = packing
        if packing:
            check_packing(model, self.options)
        _check_precision(model, autocast, Master(master), expansion, update_in_backward)
        self.model = model
        self.task = task_of(model)
        self.stream = ParameterStream(model, only_trainable=parameters == "trainable")
        self.chunks = self.stream.partition(num_chunks)
        self.schedule = Schedule(num_chunks, Order(order), switch_every, seed)
        rule = Optimizer(optimizer)
        beta1, beta2 = betas or DEFAULT_BETAS[rule]
        self.optimizer = ChunkOptimizer(
            OptimizerConfig(
                weight_decay=weight_decay,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                rule=rule,
                max_grad_norm=max_grad_norm,
                states=states,
                state_dtype=resolved_state_dtype(rule, StateDtype(state_dtype) if state_dtype else None),
                master=Master(master),
                seed=seed,
            ),
            rate_factor=rate_factor,
        )
        self.num_updates = 0
        self.loss_scale = LossScale() if _computes_in_fp16(model, autocast) else None
        self.was_skipped = False
        # Rates must not refer to the tuner: a cycle would keep its states alive until the collector comes by.
        self.lr = rate = _rate(lr)
        self.expansion = Expansion(model.named_parameters(), seed=seed) if expansion == "factored" else None
        self.expansion_lr = _rate(expansion_lr) if expansion_lr is not None else lambda update: rate(update) / 3
        self._updates_in_backward = update_in_backward
        self._has_expanded = False
        self._observer = observer or Unobserved()
        self._activation: Activation | None = None
        self._active: list[ActiveSlice] = []
        self._prepared = ExitStack()
        self._prepared.enter_context(prepared(model, self.options))

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
        """What a training spec with a fixed schedule asks for; for method ``lora``, of a model
        with adapters.
        """
        schedule = training.schedule
        assert schedule != "auto", "the planner resolves 'auto' before anything runs"
        return cls(
            model,
            schedule.num_chunks,
            lr,
            order=schedule.order,
            switch_every=schedule.switch_every,
            states=schedule.states,
            state_dtype=schedule.state_dtype,
            master=schedule.master,
            optimizer=training.optimizer,
            weight_decay=weight_decay,
            max_grad_norm=training.max_grad_norm,
            update_in_backward=training.update_in_backward,
            loss=training.loss,
            activation_checkpointing=training.activation_checkpointing,
            autocast=training.autocast,
            packing=training.packing,
            expansion=schedule.expansion,
            expansion_lr=expansion_lr,
            parameters="all" if training.lora is None else "trainable",
            rate_factor=None if training.lora is None else partial(adapter_rate_factor, training.lora),
            seed=seed,
            observer=observer,
        )

    @property
    def visit(self) -> Visit:
        """The visit that the next update belongs to."""
        return self.schedule.visit(self.num_updates)

    @property
    def active(self) -> list[ActiveSlice]:
        """The active chunk's slices; activates the chunk that is due."""
        if self._activation is None:
            on_gradient = self.optimizer.update_slice if self._updates_in_backward else None
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
        _check_batch(batch, self.task, packing=self.packing)
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
            fix = "use update_in_backward=False" if self._updates_in_backward else "pass is_last=False for those before"
            raise InputError("batch", f"weights were updated in the backward pass of a micro-batch before it: {fix}")
        if self._updates_in_backward:
            self.optimizer.begin(self.visit, self.lr(self.num_updates))
        if self.expansion is not None and self._activation is not None:
            self.expansion.learning_rate = self.expansion_lr(self.num_updates)
            self._activation.expand(is_last)
            self._has_expanded = is_last

    def step(self) -> float | None:
        """Update the active chunk, and move on when the next one is due. Returns the gradient norm before
        clipping.

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


def _computes_in_fp16(model: nn.Module, autocast: str) -> bool:
    return autocast == "fp16" or any(parameter.dtype == torch.float16 for parameter in model.parameters())


def _check_precision(model: nn.Module, autocast: str, master: Master, expansion: str, in_backward: bool) -> None:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if autocast != "none" and dtypes != {torch.float32}:
        raise InputError("autocast", f"is for fp32 weights; this model's are {', '.join(sorted(map(str, dtypes)))}")
    if torch.float16 in dtypes and master is Master.RESIDUAL:
        raise InputError("master", "'residual' is exact for bf16 weights only; use 'fp32' or 'none' for fp16")
    if not _computes_in_fp16(model, autocast):
        return
    if expansion != "none":
        raise InputError("expansion", "updates in backward, before fp16 can tell whether a gradient overflowed")
    if in_backward:
        raise InputError("update_in_backward", "updates before fp16 can tell whether a gradient overflowed")


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
