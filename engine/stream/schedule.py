"""Which chunk is active at which update, and at which rate: pure functions of the update's number."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

from chunkplan.engine.spec import JobTraining, Order, ResolvedJobTraining, ResolvedSchedule


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
    """A chunk schedule, whose position is one integer, the number of the update: nothing else is saved."""

    num_chunks: int
    order: Order = Order.DESCENDING
    switch_every: int = 1
    seed: int = 0

    @property
    def updates_per_cycle(self) -> int:
        """Optimizer updates in which every chunk is visited once."""
        return self.num_chunks * self.switch_every

    def cycle_order(self, cycle: int) -> list[int]:
        """Return chunk indices in the order in which a cycle visits them; random orders differ by cycle."""
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
    kind: Literal["constant", "linear", "cosine"], position: int, length: int, warmup_ratio: float = 0.0
) -> float:
    """Learning-rate factor in (0, 1] at a position, from 0, in a schedule of ``length``: cycles, or updates.

    The first ``warmup_ratio`` of them rise linearly; the rest stay (constant), fall linearly, or fall along a
    half cosine, in such steps that one more would be at zero: the last update is always at the schedule's
    end.
    """
    warmup = math.floor(warmup_ratio * length)
    if position < warmup:
        return (position + 1) / (warmup + 1)
    progress = min((position - warmup) / max(length - warmup, 1), 1.0)
    if kind == "linear":
        return 1.0 - progress
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def learning_rate(training: ResolvedJobTraining, update: int, num_updates: int) -> float:
    """Learning rate of an update, from 0, of a run of ``num_updates``.

    By cycle, every chunk sees the same rates, and a last cycle that is cut short counts as one.
    """
    schedule = training.schedule
    length = schedule.num_chunks * schedule.switch_every if training.lr_schedule_by == "cycle" else 1
    factor = rate_factor(training.lr_schedule, update // length, math.ceil(num_updates / length), training.warmup_ratio)
    return training.learning_rate * factor


def expected_updates(training: JobTraining, num_batches_per_epoch: int) -> int:
    """Length of a run: ``max_steps``, or as many updates as its epochs of micro-batches make."""
    if training.max_steps is not None:
        return training.max_steps
    num_batches = (training.epochs or 1.0) * num_batches_per_epoch
    return max(1, math.ceil(num_batches / training.gradient_accumulation_steps))


HANDFUL = 5
"""Updates of a parameter that a run should make at least."""


def few_updates_warning(schedule: ResolvedSchedule, num_updates: int) -> str | None:
    """One sentence when a run updates each parameter fewer than :data:`HANDFUL` times; None when it does not.

    Without expansion a parameter takes a step once in ``num_chunks`` updates. With it, a parameter also takes
    part in the visits of every chunk below its own: (``num_chunks`` + 1) / 2 of a cycle's on average.
    """
    num_chunks = schedule.num_chunks
    expands = schedule.expansion != "none"
    times = num_updates * (num_chunks + 1) / 2 / num_chunks if expands else num_updates / num_chunks
    if num_chunks == 1 or times >= HANDFUL:
        return None
    needed = math.ceil(HANDFUL * num_updates / times)
    fixes = [f"at least {needed} updates"]
    if not expands:
        if num_updates >= 2 * HANDFUL:
            fixes.append(f"at most {num_updates // HANDFUL} chunks")
        fixes.append("expansion 'factored'")
    return (
        f"{num_updates} updates over {num_chunks} chunks change each parameter only about {times:.2g} times, "
        f"too few for most fine-tuning: use {', '.join(fixes[:-1])}{' or ' if len(fixes) > 1 else ''}{fixes[-1]}"
    )
