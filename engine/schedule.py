"""Which chunk is active at which optimizer update, and at which rate: pure functions of the update's number."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

from engine.spec import Order


@dataclass(frozen=True, slots=True)
class Visit:
    """Where an optimizer update stands in the schedule."""

    update: int
    """Number of the update, from 0."""
    cycle: int
    """Cycles completed before this update."""
    chunk_index: int
    is_first: bool
    """First update of this visit of the chunk."""
    is_last: bool
    """Last update of this visit of the chunk."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A chunk schedule: its position is one integer, the number of the update, so nothing else needs to be saved."""

    num_chunks: int
    order: Order = Order.DESCENDING
    switch_every: int = 1
    seed: int = 0

    @property
    def updates_per_cycle(self) -> int:
        """Optimizer updates in which every chunk is visited once."""
        return self.num_chunks * self.switch_every

    def cycle_order(self, cycle: int) -> list[int]:
        """Chunk indices in the order in which the given cycle visits them; random orders are new in every cycle."""
        indices = list(range(self.num_chunks))
        if self.order is Order.DESCENDING:
            indices.reverse()
        elif self.order is Order.RANDOM:
            random.Random(f"{self.seed}:{cycle}").shuffle(indices)
        return indices

    def visit(self, update: int) -> Visit:
        """The visit that update number ``update`` (from 0) belongs to."""
        cycle, within = divmod(update, self.updates_per_cycle)
        turn, repeat = divmod(within, self.switch_every)
        return Visit(update, cycle, self.cycle_order(cycle)[turn], repeat == 0, repeat == self.switch_every - 1)


def rate_factor(
    kind: Literal["constant", "linear", "cosine"], cycle: int, num_cycles: int, warmup_ratio: float = 0.0
) -> float:
    """Learning-rate factor in (0, 1] of a cycle, so that every chunk sees the same rates.

    The first ``warmup_ratio`` of the cycles rise linearly; the rest stay (constant), fall linearly, or fall along a
    half cosine, in such steps that one more cycle would be at zero: the last update is always at the schedule's end.
    """
    warmup = math.floor(warmup_ratio * num_cycles)
    if cycle < warmup:
        return (cycle + 1) / (warmup + 1)
    progress = min((cycle - warmup) / max(num_cycles - warmup, 1), 1.0)
    if kind == "linear":
        return 1.0 - progress
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0
