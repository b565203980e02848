"""Elementwise optimizers as update rules on one block of fp32 weights and moments.

A block of a slice of a tensor is updated exactly as it would be within the whole tensor. Adafactor is not
elementwise: see :mod:`chunkplan.engine.optimizer.factored`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from chunkplan.engine.spec import Optimizer


@dataclass(frozen=True, slots=True)
class HyperParameters:
    """Numbers that rules take, each those that it knows."""

    weight_decay: float = 0.0
    """Decoupled: the weights shrink by ``lr * weight_decay`` at every update."""
    beta1: float = 0.9
    """Decay of the first moment (AdamW, Lion), momentum (SGD)."""
    beta2: float = 0.999
    """Decay of the second moment (AdamW, RMSprop), of Lion's momentum."""
    eps: float = 1e-8


DEFAULT_BETAS = dict.fromkeys(Optimizer, (0.9, 0.999)) | {Optimizer.LION: (0.9, 0.99)}
"""What is usual for each rule."""

UpdateRule = Callable[[Tensor, Tensor, Sequence[Tensor], int, float, HyperParameters], None]
"""``rule(weight, gradient, moments, count, lr, hyper)``: in place; fp32, [numel] each."""


def _adamw(
    weight: Tensor, gradient: Tensor, moments: Sequence[Tensor], count: int, lr: float, hyper: HyperParameters
) -> None:
    step = torch.full((), float(count - 1), dtype=torch.float32, device=weight.device)
    adamw(
        [weight], [gradient], [moments[0]], [moments[1]], [], [step],
        fused=True, amsgrad=False, beta1=hyper.beta1, beta2=hyper.beta2, lr=lr,
        weight_decay=hyper.weight_decay, eps=hyper.eps, maximize=False,
    )  # fmt: skip


def decay_(weight: Tensor, lr: float, hyper: HyperParameters) -> None:
    """Decoupled weight decay, in place."""
    if hyper.weight_decay:
        weight.mul_(1.0 - lr * hyper.weight_decay)


def _lion(
    weight: Tensor, gradient: Tensor, moments: Sequence[Tensor], count: int, lr: float, hyper: HyperParameters
) -> None:
    """Sign of the interpolated momentum. Source: Chen et al., arXiv 2302.06675, algorithm 2."""
    (momentum,) = moments
    decay_(weight, lr, hyper)
    weight.add_(momentum.lerp(gradient, 1.0 - hyper.beta1).sign_(), alpha=-lr)
    momentum.lerp_(gradient, 1.0 - hyper.beta2)


def _sgd(
    weight: Tensor, gradient: Tensor, moments: Sequence[Tensor], count: int, lr: float, hyper: HyperParameters
) -> None:
    """Heavy-ball momentum as in torch.optim.SGD, with decoupled weight decay."""
    (momentum,) = moments
    decay_(weight, lr, hyper)
    momentum.mul_(hyper.beta1 if count > 1 else 0.0).add_(gradient)
    weight.add_(momentum, alpha=-lr)


def _adagrad(
    weight: Tensor, gradient: Tensor, moments: Sequence[Tensor], count: int, lr: float, hyper: HyperParameters
) -> None:
    """As torch.optim.Adagrad without rate decay, with decoupled weight decay."""
    (total,) = moments
    decay_(weight, lr, hyper)
    total.addcmul_(gradient, gradient)
    weight.addcdiv_(gradient, total.sqrt().add_(hyper.eps), value=-lr)


def _rmsprop(
    weight: Tensor, gradient: Tensor, moments: Sequence[Tensor], count: int, lr: float, hyper: HyperParameters
) -> None:
    """As torch.optim.RMSprop (not centred, no momentum), with decoupled weight decay."""
    (mean_square,) = moments
    decay_(weight, lr, hyper)
    mean_square.mul_(hyper.beta2).addcmul_(gradient, gradient, value=1.0 - hyper.beta2)
    weight.addcdiv_(gradient, mean_square.sqrt().add_(hyper.eps), value=-lr)


RULES: dict[Optimizer, UpdateRule] = {
    Optimizer.ADAMW: _adamw,
    Optimizer.ADAMW8BIT: _adamw,
    Optimizer.LION: _lion,
    Optimizer.SGD: _sgd,
    Optimizer.ADAGRAD: _adagrad,
    Optimizer.RMSPROP: _rmsprop,
}
