"""When a finite loss means that training has failed: it stays far above what the model began with. Pure."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

MARGIN = 3.0
"""Nats above the beginning: a perplexity twenty times worse."""
PATIENCE = 8
"""Updates in a row."""
NUM_FIRST_LOSSES = 8
MIN_HELD_OUT_TOKENS = 200
"""From this many on, the held-out loss before training says what the beginning was; one row says too little.
"""


class LossWatch:
    """Sees a loss more than :data:`MARGIN` above the beginning's for :data:`PATIENCE` updates in a row.

    The beginning is the held-out loss before training, or else the median of the first eight updates' losses.
    As the latter may already have gone wrong, it counts for no more than ln(vocabulary), the loss of
    guessing. A batch's loss strays by a nat or two from row to row; eight in a row beyond three do not happen
    to a model that learns.

    Args:
        vocabulary_size: of the model's head.
    """

    def __init__(self, vocabulary_size: int) -> None:
        self._guessing = math.log(vocabulary_size)
        self._held_out: float | None = None
        self._first: list[float] = []
        self._streak = 0

    def begin(self, held_out_loss: float, num_tokens: int) -> None:
        """Take in the held-out loss before training."""
        if num_tokens >= MIN_HELD_OUT_TOKENS:
            self._held_out = held_out_loss

    @property
    def beginning(self) -> float | None:
        """The loss that others are judged by; None before there is one."""
        if self._held_out is not None:
            return self._held_out
        return min(median(self._first), self._guessing) if len(self._first) == NUM_FIRST_LOSSES else None

    def add(self, loss: float) -> bool:
        """Take in an update's loss; True when the run has diverged."""
        beginning = self.beginning
        if beginning is None:
            self._first.append(loss)
            return False
        self._streak = self._streak + 1 if loss > beginning + MARGIN else 0
        return self._streak >= PATIENCE

    def state(self) -> dict[str, Any]:
        """For a checkpoint's notes."""
        return {"held_out": self._held_out, "first": self._first, "streak": self._streak}

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        self._held_out, self._first, self._streak = state["held_out"], list(state["first"]), state["streak"]
