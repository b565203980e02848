"""8-bit optimizer states: codes of a dynamic map, and one fp32 scale per 256 elements.

The map covers seven decades below a block's largest magnitude, each with twice the levels of the one below
it, so that large values are fine and small ones are not lost. Rounding between two levels is stochastic: a
moment that decays by less than a level per update still decays. A second moment that is not zero never
becomes zero, which would let its weight leap.

Source: block-wise dynamic quantisation, Dettmers et al., arXiv 2110.02861; the levels and the rounding are
ours (docs/decisions/0006-eight-bit-states.md).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from chunkplan.engine.optimizer.state_layout import SCALED_NUMEL

_NUM_DECADES = 7
_PIECE_NUMEL = 2**19
"""Elements quantised at a time: bounds the temporaries to some 10 MiB."""
_SIGN = 128
_HALF = 16
_LOW_BITS = 2**_HALF - 1
"""Bits of fp32 that bf16 lacks."""


class Tables(NamedTuple):
    """A map of codes. All its levels are bf16 numbers, so that between two of those lies none."""

    values: Tensor
    """What each of the 256 codes stands for, fp32."""
    lower: Tensor
    """The largest level that is not above a bf16 number in [0, 1], by the number's bits; uint8."""
    chances: Tensor
    """Bits of the chance to be rounded up from there, in units of 2⁻¹⁵; int32."""


@cache
def tables(is_signed: bool, device: torch.device) -> Tables:
    """The map of signed (127 magnitudes and a sign) or unsigned (254 magnitudes) values."""
    decades = [
        torch.linspace(0.1, 1.0, 2**i * (1 if is_signed else 2) + 1, dtype=torch.float32)[1:]
        * 10.0 ** (i + 1 - _NUM_DECADES)
        for i in range(_NUM_DECADES)
    ]
    levels = torch.cat([torch.zeros(1, dtype=torch.float32), *decades]).bfloat16().float()
    numbers = torch.arange((int(torch.ones(1, dtype=torch.float32).view(torch.int32)) >> _HALF) + 1, dtype=torch.int32)
    magnitudes = (numbers << _HALF).view(torch.float32)
    lower = torch.searchsorted(levels, magnitudes, right=True) - 1
    gaps = levels.diff(append=torch.full((1,), torch.inf))
    chances = (magnitudes - levels[lower]).div_(gaps[lower]).mul_(2**15).round_()
    values = torch.cat([levels, -levels]) if is_signed else torch.nn.functional.pad(levels, (0, 1))
    return Tables(values.to(device), lower.to(device, torch.uint8), chances.to(device, torch.int32))


for _is_signed in (True, False):
    tables(_is_signed, torch.device("cpu"))  # 80 KB each that live as long as the process, not within a step's record


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
    """Write fp32 ``exact`` [numel, a multiple of 256] as ``codes`` (uint8) and ``scales`` [numel / 256].

    ``exact`` is overwritten; ``noise`` decides which way values between two levels are rounded.
    """
    per_scale = exact.view(-1, SCALED_NUMEL)
    torch.linalg.vector_norm(per_scale, float("inf"), dim=1, out=scales)
    per_scale.div_(scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1))
    for begin in range(0, exact.numel(), _PIECE_NUMEL):
        piece = slice(begin, begin + _PIECE_NUMEL)
        codes[piece].copy_(_codes(exact[piece], is_signed, noise))


def _codes(normalised: Tensor, is_signed: bool, noise: Generator | None) -> Tensor:
    """Round to bf16, then to a level, both at random and right on average; 31 bits are drawn per element."""
    _, lower, chances = tables(is_signed, normalised.device)
    bits = (normalised.abs() if is_signed else normalised).view(torch.int32)
    drawn = torch.empty_like(bits).random_(generator=noise)
    index = drawn.bitwise_and(_LOW_BITS).add_(bits).bitwise_right_shift_(_HALF)
    index.clamp_(0, lower.numel() - 1)  # NaN has no level; its scale is NaN too
    codes = torch.index_select(lower, 0, index)
    is_up = drawn.bitwise_right_shift_(_HALF) < torch.index_select(chances, 0, index)
    codes.add_(is_up.to(torch.uint8))
    if is_signed:
        return codes.add_((normalised < 0).to(torch.uint8).mul_(_SIGN))
    return codes.maximum((normalised > 0).to(torch.uint8))
