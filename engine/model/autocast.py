"""Automatic mixed precision: in which data type matrix products run, for weights in fp32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from chunkplan.engine.model.loading import DTYPES
from chunkplan.engine.spec import Precision


def autocasting(autocast: Literal["none", "bf16", "fp16"], device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of a forward pass on the device."""
    if autocast == "none":
        return nullcontext()
    return torch.autocast(autocast_kind(device), DTYPES[Precision(autocast)])


def autocast_kind(device: torch.device) -> str:
    """Return the device type whose autocast decides; tensors without storage follow the CPU's."""
    return "cpu" if device.type == "meta" else device.type


def autocast_operands(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return the tensors in autocast's data type for matrix products, unchanged outside autocast."""
    kind = autocast_kind(next(t for t in tensors if t is not None).device)
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None or not t.is_floating_point() else t.to(dtype) for t in tensors)
