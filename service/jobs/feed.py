"""Events as they come, for every stream of a server: one look at the database serves them all.

Streams that have nothing to tell cost no query of their own, and streams of one job share what is read.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field
from threading import Event

import anyio
from anyio import to_thread

from chunkplan.service.access.keys import Caller
from chunkplan.service.access.service import Access
from chunkplan.service.db import Database
from chunkplan.service.db.tables import EventRow
from chunkplan.service.jobs.repository import Head, JobRepository
from chunkplan.service.kit.paging import Window

_BATCH = 500
_MAX_BATCHES = 8


@dataclass(frozen=True)
class _Look:
    """What one look at the database has shown."""

    at: float = float("-inf")
    """Monotonic seconds."""
    heads: dict[str, Head] = field(default_factory=dict)
    """By job."""
    callers: dict[Caller, bool] = field(default_factory=dict)
    """Whether they may go on."""


class EventFeed:
    """New events of the jobs that are streamed.

    Args:
        database: of all projects: who may see a job is asked before it is streamed.
        access: says whether a key is still valid.
        poll_seconds: how often the database is looked at while there are streams.
        closing: set when the server is about to stop, so that streams end.
    """

    def __init__(self, database: Database, access: Access, poll_seconds: float, closing: Event) -> None:
        self._database = database
        self._access = access
        self._poll_seconds = poll_seconds
        self._closing = closing
        self._streams: Counter[tuple[str, Caller]] = Counter()
        self._look = _Look()
        self._batches: OrderedDict[tuple[str, int, int], list[EventRow]] = OrderedDict()
        self._turn = anyio.Lock()

    async def events(self, caller: Caller, job_id: str, last_event: int) -> AsyncIterator[EventRow]:
        """A job's events after one, until the job has ended, the caller's key has, or the server is about to
        stop.
        """
        self._streams[job_id, caller] += 1
        try:
            while not self._closing.is_set():
                look = await self._latest(job_id, caller)
                head = look.heads.get(job_id)
                if head is None or not look.callers[caller]:
                    return
                if last_event < head.last_event:
                    batch = await self._batch(job_id, last_event, head.last_event)
                    for event in batch:
                        yield event
                    # What retention has deleted leaves holes, also at the end.
                    last_event = batch[-1].number if len(batch) == _BATCH else max(head.last_event, last_event)
                elif head.is_final:
                    return
                else:
                    await anyio.sleep(self._poll_seconds)
        finally:
            self._streams[job_id, caller] -= 1
            self._streams += Counter()  # forgets what nobody streams any more

    async def _latest(self, job_id: str, caller: Caller) -> _Look:
        """A look that is not too old and has this stream in it."""
        async with self._turn:
            look = self._look
            is_old = time.monotonic() - look.at >= self._poll_seconds
            if is_old or job_id not in look.heads or caller not in look.callers:
                jobs, callers = {job for job, _ in self._streams}, {caller for _, caller in self._streams}
                self._look = await to_thread.run_sync(self._look_again, jobs, callers)
            return self._look

    def _look_again(self, job_ids: Collection[str], callers: Collection[Caller]) -> _Look:
        at = time.monotonic()
        allowed = {caller: self._access.is_still_valid(caller) for caller in callers}
        with self._database.read() as session:
            return _Look(at, JobRepository(session).heads(job_ids), allowed)

    async def _batch(self, job_id: str, after: int, last: int) -> list[EventRow]:
        """Events after one; ``last`` is the newest there was when somebody looked."""
        key = (job_id, after, last)
        async with self._turn:
            if key not in self._batches:
                self._batches[key] = await to_thread.run_sync(self._read_batch, job_id, after, last)
                while len(self._batches) > _MAX_BATCHES:
                    self._batches.popitem(last=False)
            return self._batches[key]

    def _read_batch(self, job_id: str, after: int, last: int) -> list[EventRow]:
        with self._database.read() as session:
            rows, _ = JobRepository(session).events(job_id, Window(str(after), _BATCH))
            return [row for row in rows if row.number <= last]
