"""A clock under the test's control."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class FixedClock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=UTC)
        self.seconds = 0.0

    def now(self) -> datetime:
        """The time it was moved to."""
        return self.time

    def elapsed(self) -> float:
        """What it was advanced by, together."""
        return self.seconds

    def advance(self, **duration: float) -> None:
        """Moves on by `timedelta(**duration)`."""
        self.jump(**duration)
        self.seconds += timedelta(**duration).total_seconds()

    def jump(self, **duration: float) -> None:
        """Sets the time of day, as somebody who corrects it; no time passes."""
        self.time += timedelta(**duration)
