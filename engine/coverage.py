"""Which parameters a run really changed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _digest(parameter: Tensor) -> tuple[int, int]:
    """Two sums over the bit patterns: equal weights give equal sums, and an update all but surely changes them."""
    bits = parameter.detach().contiguous().view(_INTEGERS[parameter.element_size()]).view(-1)
    return int(bits.sum(dtype=torch.int64)), int(bits[::2].sum(dtype=torch.int64))


def parameter_digests(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Digest of every unique parameter by name."""
    return {name: _digest(parameter) for name, parameter in model.named_parameters()}


def updated_share(model: nn.Module, before: dict[str, tuple[int, int]]) -> tuple[int, list[str]]:
    """Number of tensors that differ from ``before``, and the names of those that do not."""
    after = parameter_digests(model)
    unchanged = [name for name, digest in before.items() if after[name] == digest]
    return len(before) - len(unchanged), unchanged
