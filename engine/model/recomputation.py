"""Activation checkpointing that keeps the truncation: layers below the active chunk are not recomputed.

Each chosen layer's ``forward`` is wrapped on the instance with torch's non-reentrant checkpoint.
transformers' own ``gradient_checkpointing_enable()`` is not used: it forces gradients onto the embedding's
output, so that every layer would be recomputed whatever chunk is active.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def _checkpointed(layer: nn.Module) -> Callable[..., Any]:
    forward = layer.forward

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Dropout hides in functional calls, router noise elsewhere: in training the random state is always
        # kept (5 KB).
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=layer.training, **kwargs)

    return run


@contextmanager
def checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Recompute the given layers in backward instead of keeping their activations; undone on exit."""
    replaced = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _checkpointed(layer)
    try:
        yield
    finally:
        for layer, own in zip(layers, replaced, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own
