"""Where the time comes from: injected wherever time decides something.

The time of day can be set, forwards and back, and differs between machines: it says when something happened.
How long something takes, and whether it took too long, is measured by `Clock.elapsed`, which nobody sets.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Tells the time."""

    def now(self) -> datetime:
        """The current time, UTC-aware."""

    def elapsed(self) -> float:
        """Seconds since some moment; they only grow, and a machine's sleep counts."""


class SystemClock:
    """The machine's clock."""

    def now(self) -> datetime:
        """The current time, UTC-aware."""
        return datetime.now(UTC)

    def elapsed(self) -> float:
        """Seconds since some moment; they only grow, and a machine's sleep counts."""
        return time.clock_gettime(_STEADY)


_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
