"""The training step that the engine executes and the planner traces.

One definition, so that prediction and reality cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from chunkplan.engine.data.tokens import IGNORE_INDEX
from chunkplan.engine.errors import InputError
from chunkplan.engine.gradients.fused_loss import LogitTransform, fused_linear_cross_entropy
from chunkplan.engine.model.autocast import autocasting
from chunkplan.engine.model.packed_rows import check_isolation
from chunkplan.engine.model.parts import decoder_layers, head, head_input
from chunkplan.engine.model.recomputation import checkpointed
from chunkplan.engine.model.tasks import model_inputs, num_counted_tokens, task_of
from chunkplan.engine.spec import CheckpointedLayers, StepSpec

__all__ = [
    "PLAIN_STEP", "Observer", "Unobserved", "check_fused_loss", "check_packing", "compute_loss", "evaluate",
    "forward_backward", "num_counted_tokens", "prepared",
]  # fmt: skip


class Observer(Protocol):
    """Whoever wants to know in which phase a step is: the profiler in a run, the tracer in a plan."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Context of one phase: load, forward, backward or optimizer."""


class Unobserved:
    """Observer that does nothing."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """No-op context."""
        return nullcontext()


PLAIN_STEP = StepSpec(activation_checkpointing="none")
"""What a check computes by: nothing is recomputed."""


@contextmanager
def prepared(model: nn.Module, options: StepSpec) -> Iterator[None]:
    """Install activation checkpointing on the model for as long as the context lasts.

    Raises:
        InputError: a layer index that the model does not have.
    """
    layers = decoder_layers(model)
    choice = options.activation_checkpointing
    if isinstance(choice, CheckpointedLayers):
        if any(index >= len(layers) for index in choice.layers):
            raise InputError(
                "training.activation_checkpointing.layers", f"this model has {len(layers)} layers, indices from 0"
            )
        layers = [layers[index] for index in sorted(set(choice.layers))]
    elif choice == "none":
        layers = []
    with checkpointed(layers):
        yield


def compute_loss(model: nn.Module, batch: Mapping[str, Tensor], denominator: float, options: StepSpec) -> Tensor:
    """Return the task's loss of a batch: summed over counted tokens, over ``denominator``; a scalar."""
    with autocasting(options.autocast, batch["labels"].device):
        return _compute_loss(model, batch, denominator, options)


def _compute_loss(model: nn.Module, batch: Mapping[str, Tensor], denominator: float, options: StepSpec) -> Tensor:
    task, labels = task_of(model), batch["labels"]
    inputs = model_inputs(model, batch, task)
    # A causal model's last position predicts nothing. Labels move instead of the states, which need no copy
    # then.
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) if task.shifts_labels else labels
    if options.loss == "standard":
        # Own losses are means over the batch's counted tokens, whatever arguments a family knows.
        own: Tensor = model(**inputs, labels=labels).loss
        return own.float() * ((shifted != IGNORE_INDEX).sum() / denominator)
    hidden, projection = head_input(model, inputs), head(model)
    transform = LogitTransform.of(getattr(model, "config", None))
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), shifted.reshape(-1)
    del hidden, inputs
    return fused_linear_cross_entropy(flat, projection.weight, targets, denominator, projection.bias, transform)


def forward_backward(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    denominator: float,
    options: StepSpec,
    observer: Observer,
) -> Tensor:
    """Run forward and backward of one micro-batch into the active leaves; return the detached loss,
    a scalar.
    """
    with observer.phase("forward"):
        loss = compute_loss(model, batch, denominator, options)
    with observer.phase("backward"):
        if loss.requires_grad:  # not when nothing of the chunk takes part in this batch (unrouted experts)
            loss.backward()
        return loss.detach()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], options: StepSpec) -> tuple[float, int]:
    """Mean loss per counted token over the batches, and the number of those tokens."""
    was_training, task = model.training, task_of(model)
    model.eval()
    total, num_tokens = 0.0, 0
    for batch in batches:
        total += float(compute_loss(model, batch, 1.0, options))
        num_tokens += num_counted_tokens(batch["labels"], task)
        del batch  # before the next one is made
    model.train(was_training)
    return total / max(num_tokens, 1), num_tokens


def check_fused_loss(model: nn.Module) -> None:
    """Compare the fused loss with the model's own on a few tokens: an unknown family cannot train wrongly.

    Raises:
        InputError: they differ.
    """
    device = next(model.parameters()).device
    vocab = head(model).weight.shape[0]
    ids = torch.arange(8, device=device).remainder_(vocab).unsqueeze(0)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    counted = float(max(num_counted_tokens(ids, task_of(model)), 1))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        fused = compute_loss(model, batch, counted, PLAIN_STEP)
        own = compute_loss(model, batch, counted, PLAIN_STEP.model_copy(update={"loss": "standard"}))
    model.train(was_training)
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2
    if not torch.isclose(fused, own.to(fused.dtype), rtol=tolerance, atol=tolerance, equal_nan=True):
        raise InputError(
            "training.loss",
            f"'fused' gives {float(fused):.5f} where {type(model).__name__} gives {float(own):.5f}; use 'standard'",
        )


def check_packing(model: nn.Module, options: StepSpec) -> None:
    """Make sure that rows which share a sequence do not see each other.

    Raises:
        InputError: they do, or nobody can tell.
    """
    check_isolation(model, lambda batch: compute_loss(model, batch, 1.0, options))
