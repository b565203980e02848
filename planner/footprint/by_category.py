"""Bytes split by category, with the arithmetic of a number: what adds up totals adds up them too. Pure.

>>> weights, states = ByCategory.of("weights", 6), ByCategory.of("optimizer_states", 2)
>>> (weights + states * 3).total_bytes
12
>>> weights > states  # by the total
True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from chunkplan.planner.trace.step_trace import CATEGORIES


@dataclass(frozen=True, slots=True)
class ByCategory:
    """Bytes of each category, in the order of :data:`chunkplan.planner.trace.step_trace.CATEGORIES`."""

    values: tuple[int, ...]

    @staticmethod
    def of(category: str | int, size_bytes: int) -> ByCategory:
        """So many bytes of one category, given by its name or its index."""
        index = CATEGORIES.index(category) if isinstance(category, str) else category
        return ByCategory(tuple(size_bytes if i == index else 0 for i in range(len(CATEGORIES))))

    @property
    def total_bytes(self) -> int:
        """Sum over the categories."""
        return sum(self.values)

    def as_dict(self) -> dict[str, int]:
        """Bytes under the names of their categories."""
        return dict(zip(CATEGORIES, self.values, strict=True))

    def without(self, category: str) -> ByCategory:
        """All bytes but those of one category."""
        return ByCategory(
            tuple(0 if name == category else value for name, value in zip(CATEGORIES, self.values, strict=True))
        )

    def __add__(self, other: ByCategory) -> ByCategory:
        return ByCategory(tuple(a + b for a, b in zip(self.values, other.values, strict=True)))

    def __sub__(self, other: ByCategory) -> ByCategory:
        return ByCategory(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))

    def __mul__(self, factor: int) -> ByCategory:
        return ByCategory(tuple(value * factor for value in self.values))

    def __gt__(self, other: ByCategory) -> bool:
        """Is it more in total?"""
        return self.total_bytes > other.total_bytes


NOTHING = ByCategory((0,) * len(CATEGORIES))

Amount = TypeVar("Amount", int, ByCategory)
"""Bytes in total, which is quick, or by category."""
