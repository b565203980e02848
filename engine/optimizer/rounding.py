"""16-bit weights and their fp32 master: stochastic rounding, and the 16 bits that rounding leaves over.

What stochastic rounding draws depends on the place and the update alone, not on what was drawn before: an
update gives the same weights whenever in the step it happens.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Generator, Tensor

_LOW_HALF = 2**16
_FP16_DIGITS = 11
_FP16_MIN_EXPONENT = -13
"""Exponent of fp16's smallest normal number as torch.frexp counts it, whose mantissa is in [0.5, 1)."""
_FP16_MAX = 65504.0


class Noise:
    """Random generators for places of the parameter stream."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._generators: dict[torch.device, Generator] = {}

    def at(self, device: torch.device, *place: int | str) -> Generator | None:
        """Return the generator on ``device``, set to where this place's numbers begin; None where nothing
        runs.
        """
        if device.type == "meta":
            return None
        if device not in self._generators:
            self._generators[device] = Generator(device)
        digest = hashlib.blake2b(repr((self._seed, *place)).encode(), digest_size=8).digest()
        return self._generators[device].manual_seed(int.from_bytes(digest))


def stochastic_round_(exact: Tensor, noise: Generator | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Round fp32 ``exact`` in place to values of bf16 or fp16, up or down, so that the mean is exact.

    Beyond fp16's largest number, values become that number: nothing else could be right on average.
    """
    if dtype == torch.float16:
        return _stochastic_round_fp16_(exact, noise)
    bits = exact.view(torch.int32)
    drawn = torch.randint(0, _LOW_HALF, bits.shape, dtype=torch.int32, device=bits.device, generator=noise)
    # The low half is cut off after the noise was added: a carry into the high half is rounding up.
    bits.add_(drawn).bitwise_and_(-_LOW_HALF)
    return exact


def _stochastic_round_fp16_(exact: Tensor, noise: Generator | None) -> Tensor:
    """Count in units of fp16's spacing, that of subnormals below 2**-14: every product here is exact."""
    exponent = torch.frexp(exact).exponent.clamp_(min=_FP16_MIN_EXPONENT)
    unit = torch.ldexp(torch.ones_like(exact), exponent.sub_(_FP16_DIGITS))
    exact.div_(unit)
    drawn = torch.rand(exact.shape, dtype=exact.dtype, device=exact.device, generator=noise)
    # Down to an integer after the noise was added would round the sum first: compare with the fraction
    # instead.
    floor = exact.floor()
    exact.sub_(floor).gt_(drawn).add_(floor).mul_(unit)
    return exact.clamp_(-_FP16_MAX, _FP16_MAX)


def join(rounded: Tensor, residual: Tensor) -> Tensor:
    """Return the fp32 master of a bf16 weight and its residual: their bit patterns, added."""
    bits = rounded.view(torch.int16).to(torch.int32).mul_(_LOW_HALF).add_(residual)
    return bits.view(torch.float32)


def split(exact: Tensor, rounded: Tensor, residual: Tensor) -> None:
    """Round the fp32 master to nearest into ``rounded`` (bf16); what is left over goes to ``residual``
    (int16).

    The difference of the bit patterns lies in [−2¹⁵, 2¹⁵], and 2¹⁵ itself, a tie that was rounded down to
    even, is the one value that int16 lacks: there the weight keeps its rounding away from even instead.
    """
    rounded.copy_(exact)
    difference = exact.view(torch.int32) - rounded.view(torch.int16).to(torch.int32).mul_(_LOW_HALF)
    tie = difference == 2**15
    rounded.view(torch.int16).add_(tie.to(torch.int16))
    residual.copy_(difference.sub_(tie.to(torch.int32).mul_(_LOW_HALF)))
