"""A clock under the test's control."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class FixedClock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        """The time it was moved to."""
        return self.time

    def advance(self, **duration: float) -> None:
        """Moves on by `timedelta(**duration)`."""
        self.time += timedelta(**duration)
