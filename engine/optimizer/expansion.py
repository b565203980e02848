"""Landscape expansion: a cheap update, in the same backward pass, of parameters outside the active chunk.

The gradient passes through the layers above the active chunk anyway. With expansion their weights take a step
too, tensor by tensor as each gradient appears, with second moments factored into a row and a column per
matrix; then the gradient is freed. The cut tensors' other rows and everything below the chunk stay as they
are.

Sources: BREAD (landscape expansion of block coordinate descent, NeurIPS 2025); the factored update is
Adafactor's, arXiv 1804.04235 (:mod:`chunkplan.engine.optimizer.factored`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chunkplan.engine.optimizer.factored import FactoredUpdate
from chunkplan.engine.optimizer.rounding import Noise, stochastic_round_
from chunkplan.engine.stream.chunks import matrix_shape


@dataclass(frozen=True, slots=True)
class ExpansionConfig:
    """Hyper-parameters of the factored update."""

    beta2: float = 0.99
    clip_rms: float = 1.0
    """Each tensor's update is scaled so that its root mean square does not exceed this."""


@dataclass(slots=True)
class FactoredMoments:
    """Running means of squared gradients per row and per column of a matrix, fp32; a vector is one column."""

    row: Tensor
    column: Tensor
    num_updates: int = 0


class Expansion:
    """Holds the factored moments of all parameters, and updates those that it watches during a backward pass.

    Args:
        named: every parameter that may be watched, by name.
        config: hyper-parameters.
        seed: of stochastic rounding.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], config: ExpansionConfig | None = None, seed: int = 0
    ) -> None:
        self.config = config or ExpansionConfig()
        self.learning_rate = 0.0
        self._noise = Noise(seed)
        self.moments = {name: _new_moments(parameter) for name, parameter in named}

    def state_dict(self) -> dict[str, Tensor]:
        """All moments and counts, by ``kind.parameter``."""
        state = {}
        for name, moments in self.moments.items():
            state[f"row.{name}"], state[f"column.{name}"] = moments.row.cpu(), moments.column.cpu()
            state[f"count.{name}"] = torch.tensor(moments.num_updates)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`state_dict`."""
        for name, moments in self.moments.items():
            moments.row.copy_(state[f"row.{name}"])
            moments.column.copy_(state[f"column.{name}"])
            moments.num_updates = int(state[f"count.{name}"])

    def watch(self, name: str, parameter: nn.Parameter) -> RemovableHandle:
        """Make the parameter trainable, and update it whenever its gradient is complete, until the handle is
        gone.
        """
        parameter.requires_grad_(True)
        shape, moments = matrix_shape(parameter.shape), self.moments[name]

        def update(owner: Tensor) -> None:
            gradient, owner.grad = owner.grad, None
            assert gradient is not None
            self._update(name, owner.detach().view(shape), gradient.view(shape), moments)

        return parameter.register_post_accumulate_grad_hook(update)

    @torch.no_grad()
    def _update(self, name: str, weight: Tensor, gradient: Tensor, moments: FactoredMoments) -> None:
        """One step of a matrix, a block of rows at a time."""
        moments.num_updates += 1
        # A plain mean at first and an exponential one later need no bias correction.
        decay = min(self.config.beta2, 1.0 - 1.0 / moments.num_updates)
        update = FactoredUpdate(gradient, moments.row, moments.column, decay, self.config.clip_rms)
        noise = self._noise.at(weight.device, name, moments.num_updates)
        for block in update.blocks:
            step = update.rows(block).mul_(self.learning_rate)
            if weight.dtype == torch.float32:
                weight[block].sub_(step)
            else:
                weight[block].copy_(stochastic_round_(weight[block].float().sub_(step), noise))


def _new_moments(parameter: nn.Parameter) -> FactoredMoments:
    num_rows, num_columns = matrix_shape(parameter.shape)
    row = torch.zeros(num_rows, 1, dtype=torch.float32, device=parameter.device)
    column = torch.zeros(1, num_columns, dtype=torch.float32, device=parameter.device)
    return FactoredMoments(row, column)
