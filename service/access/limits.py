"""How much one key or one project may take: requests in time (token buckets), and things at the same time
(turns).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio

from chunkplan.service.errors import TooMany
from chunkplan.service.kit.clock import Clock


@dataclass
class _Bucket:
    tokens: float
    seconds: float
    """When it was last looked at."""


class Buckets:
    """One token bucket per name; the ones used longest ago are forgotten when there are too many.

    Args:
        clock: tells when tokens come back.
        max_buckets: how many are remembered.
    """

    def __init__(self, clock: Clock, max_buckets: int = 10_000) -> None:
        self._clock = clock
        self._max_buckets = max_buckets
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, name: str, per_second: float, burst: int) -> None:
        """Takes one token.

        Raises:
            TooMany: there is none; says when there will be.
        """
        now = self._clock.now().timestamp()
        with self._lock:
            bucket = self._buckets.pop(name, None) or _Bucket(burst, now)
            self._buckets[name] = bucket
            if len(self._buckets) > self._max_buckets:
                self._buckets.popitem(last=False)
            bucket.tokens = min(burst, bucket.tokens + max(0.0, now - bucket.seconds) * per_second)
            bucket.seconds = now
            missing = 1 - bucket.tokens
            if missing <= 0:
                bucket.tokens -= 1
                return
        message = f"more than {per_second:g} requests per second"
        raise TooMany("rate_limited", message, retry_after_seconds=missing / per_second)


@dataclass
class _WaitingLine:
    semaphore: anyio.Semaphore
    num_inside: int = 0
    """Waiting ones included."""


@dataclass
class Turns:
    """Who may be at something at the same time; others wait their turn, or are refused."""

    code: str
    """Code of the refusal."""
    what: str
    """What there is too much of, as the refusal says it."""
    _lanes: dict[str, _WaitingLine] = field(default_factory=dict)

    @asynccontextmanager
    async def turn(
        self, name: str, at_once: int, max_waiting: int = 0, max_seconds: float | None = None
    ) -> AsyncIterator[None]:
        """Waits for a place among those of the same name, and keeps it while the block runs.

        Raises:
            TooMany: too many wait already, or it took too long.
        """
        lane = self._lanes.setdefault(name, _WaitingLine(anyio.Semaphore(at_once)))
        if lane.num_inside >= at_once + max_waiting:
            raise self._refusal(f"{lane.num_inside} {self.what} at once")
        lane.num_inside += 1
        try:
            with anyio.move_on_after(max_seconds) as waiting:
                await lane.semaphore.acquire()
            if waiting.cancelled_caught:
                raise self._refusal(f"{self.what}: no turn within {max_seconds:g} seconds")
            try:
                yield
            finally:
                lane.semaphore.release()
        finally:
            lane.num_inside -= 1
            if lane.num_inside == 0:
                del self._lanes[name]

    def _refusal(self, detail: str) -> TooMany:
        return TooMany(self.code, detail, retry_after_seconds=10)
