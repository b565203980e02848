"""8-bit optimizer states: codes of a dynamic map, and one fp32 scale per 256 elements.

The map covers seven decades below a block's largest magnitude, each with twice the levels of the one below it, so that
large values are fine and small ones are not lost. Rounding between two levels is stochastic: a moment that decays by
less than a level per update still decays. A second moment that is not zero never becomes zero, which would let its
weight leap.

Source: block-wise dynamic quantisation, Dettmers et al., arXiv 2110.02861; the levels and the rounding are ours
(docs/decisions/0006-eight-bit-states.md).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from engine.states import SCALED_NUMEL

_NUM_DECADES = 7
_PIECE_NUMEL = 2**19
"""Elements quantised at a time: bounds the temporaries to some 16 MiB."""
_SIGN = 128
_HALF = 16
"""Bits of fp32 below those that look up a level."""


class Tables(NamedTuple):
    """Levels of magnitudes in [0, 1], ascending from 0, one more beyond the last; and who is next below a number."""

    levels: Tensor
    gaps: Tensor
    """Distance to the next level; infinite at the last, from which nothing rounds up."""
    values: Tensor
    """What each of the 256 codes stands for."""
    lower: Tensor
    """Index of the largest level that is not above a number, by the upper half of the number's bits."""


@cache
def tables(is_signed: bool, device: torch.device) -> Tables:
    """The map of signed (127 magnitudes and a sign) or unsigned (254 magnitudes) values."""
    decades = [
        torch.linspace(0.1, 1.0, 2**i * (1 if is_signed else 2) + 1, dtype=torch.float64)[1:] * 10.0 ** (i + 1 - 7)
        for i in range(_NUM_DECADES)
    ]
    levels = torch.cat([torch.zeros(1, dtype=torch.float64), *decades]).float()
    beyond = torch.cat([levels, torch.tensor([torch.inf])])
    numbers = torch.arange((int(torch.ones(1).view(torch.int32)) >> _HALF) + 1, dtype=torch.int32)
    lower = torch.searchsorted(levels, (numbers << _HALF).view(torch.float32), right=True) - 1
    values = torch.cat([levels, -levels]) if is_signed else torch.nn.functional.pad(levels, (0, 1))
    found = Tables(beyond, beyond.diff(), values, lower.to(torch.uint8))
    return Tables(*(table.to(device) for table in found))


for _is_signed in (True, False):
    tables(_is_signed, torch.device("cpu"))  # 20 KB each that live as long as the process, not within a step's record


def dequantise(codes: Tensor, scales: Tensor, is_signed: bool) -> Tensor:
    """fp32 values of uint8 ``codes`` [numel], 256 per entry of ``scales``. New tensor [numel]."""
    values = tables(is_signed, codes.device).values
    found = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for begin in range(0, codes.numel(), _PIECE_NUMEL):
        piece = slice(begin, begin + _PIECE_NUMEL)
        torch.index_select(values, 0, codes[piece].int(), out=found[piece])
    found.view(-1, SCALED_NUMEL).mul_(scales.unsqueeze(1))
    return found


def quantise(exact: Tensor, codes: Tensor, scales: Tensor, is_signed: bool, noise: Generator | None) -> None:
    """Write fp32 ``exact`` [numel], a multiple of 256 long, into uint8 ``codes`` [numel] and ``scales`` [numel / 256].

    ``exact`` is overwritten; ``noise`` decides which way values between two levels are rounded.
    """
    per_scale = exact.view(-1, SCALED_NUMEL)
    torch.linalg.vector_norm(per_scale, float("inf"), dim=1, out=scales)
    per_scale.div_(scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1))
    for begin in range(0, exact.numel(), _PIECE_NUMEL):
        piece = slice(begin, begin + _PIECE_NUMEL)
        codes[piece].copy_(_codes(exact[piece], is_signed, noise))


def _codes(normalised: Tensor, is_signed: bool, noise: Generator | None) -> Tensor:
    levels, gaps, _, lower = tables(is_signed, normalised.device)
    magnitude = normalised.abs() if is_signed else normalised
    # The upper half of the bits finds the level to within one; one comparison finds it exactly.
    upper = magnitude.view(torch.int32).bitwise_right_shift(_HALF)
    # NaN has no level: it takes the last, and its scale is NaN too.
    index = torch.index_select(lower, 0, upper.clamp_(0, lower.numel() - 1)).int()
    del upper
    index.add_((magnitude >= torch.index_select(levels, 0, index + 1)).int())
    rest = magnitude - torch.index_select(levels, 0, index)
    share = torch.rand(rest.shape, dtype=torch.float32, device=rest.device, generator=noise)
    index.add_((rest > share.mul_(torch.index_select(gaps, 0, index))).int())
    if is_signed:
        return index.add_((normalised < 0).int().mul_(_SIGN))
    return index.maximum((normalised > 0).int())
