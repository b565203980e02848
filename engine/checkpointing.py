"""Activation checkpointing that keeps the truncation: only layers that backpropagation reaches are recomputed.

Each chosen layer's ``forward`` is wrapped on the instance with torch's non-reentrant checkpoint. transformers' own
``gradient_checkpointing_enable()`` is not used: it forces gradients onto the embedding's output, so that every layer
would be recomputed whatever chunk is active.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def _has_dropout(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    rates = [getattr(config, key, 0.0) for key in ("attention_dropout", "attn_pdrop", "dropout")]
    active = any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())
    return active or any(isinstance(rate, float) and rate > 0 for rate in rates)


def _checkpointed(layer: nn.Module) -> Callable[..., Any]:
    forward = layer.forward
    keep_rng = _has_dropout(layer)

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=keep_rng, **kwargs)

    return run


@contextmanager
def checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Recompute the given layers in backward instead of keeping their activations; undone on exit."""
    for layer in layers:
        layer.forward = _checkpointed(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
