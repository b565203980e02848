"""Dynamic loss scaling: small fp16 gradients do not vanish, and no update takes those that overflowed.

The loss is multiplied by the scale, so gradients arrive scaled; they are divided again in fp32, where the
update is computed. An overflow skips the update: its micro-batches and its place in the schedule are spent,
the chunk's step count is not, and the scale is halved. The schedule moves on, so that a chunk whose gradients
overflow is never stuck.

Source: Mixed Precision Training, arXiv 1710.03740, section 3.2, and the usual dynamic rule.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from chunkplan.engine.gradients.activation import ActiveSlice

MAX_SKIPPED_IN_ROW = 24
"""From 2**16 to below 2**-7: gradients that still overflow are not a matter of scale."""


@dataclass(slots=True)
class LossScale:
    """The scale and what moves it."""

    scale: float = 2.0**16
    growth_interval: int = 200
    """Updates without overflow until the scale is doubled."""
    num_clean: int = 0
    num_skipped_in_row: int = 0

    def accepts(self, active: list[ActiveSlice]) -> bool:
        """True when all gradients are finite; adjusts the scale for the next update either way."""
        gradients = [piece.tensor.grad for piece in active if piece.tensor.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        if norms and not bool(torch.isfinite(torch.stack(norms).sum())):
            self.scale, self.num_clean = self.scale / 2, 0
            self.num_skipped_in_row += 1
            return False
        self.num_clean, self.num_skipped_in_row = self.num_clean + 1, 0
        if self.num_clean == self.growth_interval:
            self.scale, self.num_clean = self.scale * 2, 0
        return True

    def state(self) -> dict[str, float]:
        """For the checkpoint."""
        return asdict(self)
