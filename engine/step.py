"""The training step that the engine executes and the planner traces.

One definition, so that prediction and reality cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from engine.checkpointing import checkpointed
from engine.errors import InputError
from engine.loss import IGNORE_INDEX, LogitTransform, fused_linear_cross_entropy
from engine.models import decoder_layers, head, last_hidden_state
from engine.spec import CheckpointedLayers


class Observer(Protocol):
    """Whoever wants to know in which phase a step is: the profiler in a run, the tracer in a plan."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Context of one phase: load, forward, backward or optimizer."""


class Unobserved:
    """Observer that does nothing."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """No-op context."""
        return nullcontext()


@dataclass(frozen=True, slots=True)
class StepOptions:
    """What decides the operations of a forward and backward pass besides model, chunk and batch."""

    loss: Literal["fused", "standard"] = "fused"
    activation_checkpointing: Literal["full", "none"] | CheckpointedLayers = "none"


@contextmanager
def prepared(model: nn.Module, options: StepOptions) -> Iterator[None]:
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


def num_counted_tokens(labels: Tensor) -> int:
    """Tokens that enter the loss of a causal model: labels after the first position that are not ignored."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def compute_loss(
    model: nn.Module, input_ids: Tensor, labels: Tensor, denominator: float, options: StepOptions
) -> Tensor:
    """Causal language-model loss: sum over counted tokens / ``denominator``. Both inputs [batch, sequence], int64."""
    if options.loss == "standard":
        output = model(input_ids=input_ids, labels=labels, num_items_in_batch=denominator, use_cache=False)
        standard: Tensor = output.loss
        return standard
    hidden = last_hidden_state(model, input_ids)
    projection = head(model)
    # Positions shift by one: the last one predicts nothing. Labels move instead of the states, which need no copy then.
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).reshape(-1)
    transform = LogitTransform.of(getattr(model, "config", None))
    flat = hidden.reshape(-1, hidden.shape[-1])
    del hidden
    return fused_linear_cross_entropy(flat, projection.weight, shifted, denominator, projection.bias, transform)


def forward_backward(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    denominator: float,
    options: StepOptions,
    observer: Observer,
) -> Tensor:
    """One micro-batch: forward, then backward into the active chunk's leaves. Returns the detached loss, a scalar."""
    with observer.phase("forward"):
        loss = compute_loss(model, input_ids, labels, denominator, options)
    with observer.phase("backward"):
        if loss.requires_grad:  # not when nothing of the chunk takes part in this batch (unrouted experts)
            loss.backward()
        return loss.detach()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], options: StepOptions) -> tuple[float, int]:
    """Mean loss per counted token over the batches, and the number of those tokens."""
    was_training = model.training
    model.eval()
    total, num_tokens = 0.0, 0
    for input_ids, labels in batches:
        total += float(compute_loss(model, input_ids, labels, 1.0, options))
        num_tokens += num_counted_tokens(labels)
    model.train(was_training)
    return total / max(num_tokens, 1), num_tokens


def check_fused_loss(model: nn.Module) -> None:
    """Compare fused and own loss of the model on a few tokens, so that an unknown family cannot train on a wrong loss.

    Raises:
        InputError: they differ.
    """
    device = next(model.parameters()).device
    vocab = head(model).weight.shape[0]
    ids = torch.arange(8, device=device).remainder_(vocab).unsqueeze(0)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        fused = compute_loss(model, ids, ids, 7.0, StepOptions("fused"))
        own = compute_loss(model, ids, ids, 7.0, StepOptions("standard"))
    model.train(was_training)
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2
    if not torch.isclose(fused, own.to(fused.dtype), rtol=tolerance, atol=tolerance, equal_nan=True):
        raise InputError(
            "training.loss",
            f"'fused' gives {float(fused):.5f} where {type(model).__name__} gives {float(own):.5f}; use 'standard'",
        )
