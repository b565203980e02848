"""Which parameters a run really changed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK_NUMEL = 2**18
_ODD = 0x9E3779B97F4A7C15 - 2**64
"""Multiples of 2**64 / golden ratio: products with it differ in all bits; sums wrap around."""


def _digest(parameter: Tensor) -> int:
    """A sum over the bit patterns, each weighted by its place.

    Equal weights give equal sums. Steps of one size up and down, such as Adam's first, cancel in a plain sum.
    """
    bits = parameter.detach().contiguous().view(_INTEGERS[parameter.element_size()]).view(-1)
    places = torch.arange(1, min(_BLOCK_NUMEL, bits.numel()) + 1, device=bits.device).mul_(_ODD)
    places ^= places >> 29  # an arithmetic progression would let + - - + cancel
    digest = 0
    for begin in range(0, bits.numel(), _BLOCK_NUMEL):
        block = bits[begin : begin + _BLOCK_NUMEL]
        digest = hash((digest, int((block * places[: block.numel()]).sum())))
    return digest


def parameter_digests(model: nn.Module) -> dict[str, int]:
    """Return a digest of every unique parameter that can be trained, by name: not of frozen ones."""
    return {name: _digest(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}


def updated_share(model: nn.Module, before: dict[str, int]) -> tuple[int, list[str]]:
    """Number of tensors that differ from ``before``, and the names of those that do not."""
    now = dict(model.named_parameters())
    unchanged = [name for name, digest in before.items() if _digest(now[name]) == digest]
    return len(before) - len(unchanged), unchanged
