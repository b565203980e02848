"""Second moments factored into a row and a column per matrix, and the update that follows from them.

Source: Adafactor, arXiv 1804.04235, without momentum and without its relative step size. Shared by the
optimizer ``adafactor`` (the active chunk) and by landscape expansion (what lies above it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from chunkplan.engine.optimizer.state_layout import BLOCK_NUMEL

_TINY = 1e-30


class FactoredUpdate:
    """One step's update of a matrix, a block of rows at a time: its root mean square is at most ``clip_rms``.

    Args:
        gradient: [rows, columns]; a vector is one column, whose second moments are then exact.
        row: running mean of squared gradients of each row, fp32 [rows, 1]; brought up to date here.
        column: the same of each column, [1, columns].
        decay: how much of both remains.
        clip_rms: the whole update is scaled down to this root mean square.
        loss_scale: what the gradient is too large by.
    """

    def __init__(
        self, gradient: Tensor, row: Tensor, column: Tensor, decay: float, clip_rms: float, loss_scale: float = 1.0
    ) -> None:
        self._gradient, self._loss_scale = gradient, loss_scale
        num_rows, num_columns = gradient.shape
        per_block = max(1, BLOCK_NUMEL // num_columns)
        self.blocks = [slice(begin, begin + per_block) for begin in range(0, num_rows, per_block)]
        columns = torch.zeros_like(column)
        for block in self.blocks:
            squares = self._exact(block).square()
            row[block].lerp_(squares.mean(1, keepdim=True), 1.0 - decay)
            columns += squares.sum(0, keepdim=True)
            del squares
        column.lerp_(columns.div_(num_rows), 1.0 - decay)
        self._row = (row / row.mean().clamp_(min=_TINY)).clamp_(min=_TINY).rsqrt_()
        self._column = column.clamp(min=_TINY).rsqrt_()
        total = torch.zeros((), dtype=torch.float32, device=gradient.device)
        for block in self.blocks:
            total += self._unclipped(block).square_().sum()
        self._factor = total.div_(gradient.numel()).sqrt_().div_(clip_rms).clamp_(min=1.0).reciprocal_()

    def rows(self, block: slice) -> Tensor:
        """The update of a block of rows, to be subtracted times the learning rate: fp32, a new tensor."""
        return self._unclipped(block).mul_(self._factor)

    def _unclipped(self, block: slice) -> Tensor:
        return (self._exact(block) * self._row[block]).mul_(self._column)

    def _exact(self, block: slice) -> Tensor:
        gradient = self._gradient[block].float()
        return gradient if self._loss_scale == 1.0 else gradient / self._loss_scale
