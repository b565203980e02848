"""Deleting what is past its retention, a few rows at a time, so that nobody waits for it.

Every batch is a unit of work of its own, and between two of them the database is left alone for as long as
one took. It may be stopped anywhere, repeated at any time, and run by several servers at once: they pass over
each other's rows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import ColumnElement, delete, select, true, tuple_

from chunkplan.service.db import Database
from chunkplan.service.db.tables import EventRow, IdempotencyRow, JobRow, SampleRow
from chunkplan.service.job_states import JobState
from chunkplan.service.kit.clock import Clock
from chunkplan.service.operation.metrics import Metrics
from chunkplan.service.settings import Settings

log = structlog.get_logger(__name__)

_FINAL = [state for state in JobState if state.is_final]


@dataclass(frozen=True)
class _Rule:
    """What of a table may go."""

    name: str
    """For people."""
    table: Any
    before: datetime
    condition: ColumnElement[bool]


class Retention:
    """Retention as the settings want it."""

    def __init__(self, database: Database, settings: Settings, clock: Clock) -> None:
        self._database = database
        self._settings = settings
        self._clock = clock

    def prune(
        self, stop: threading.Event | None = None, on_batch: Callable[[str, int], object] | None = None
    ) -> dict[str, int]:
        """Deletes what is too old; returns how many rows of what.

        Args:
            stop: ends it after the batch at hand.
            on_batch: told what was deleted after every batch.
        """
        stop = stop or threading.Event()
        deleted: dict[str, int] = {}
        for rule in self._rules():
            deleted[rule.name] = 0
            after: tuple[Any, ...] | None = None
            while not stop.is_set():
                started = time.monotonic()
                count, after = self._batch(rule, after)
                deleted[rule.name] += count
                if count and on_batch is not None:
                    on_batch(rule.name, count)
                if after is None:
                    break
                stop.wait(time.monotonic() - started)
        return deleted

    def _rules(self) -> list[_Rule]:
        now = self._clock.now()
        raw = now - timedelta(days=self._settings.samples_retention_days)
        keys = now - timedelta(hours=self._settings.idempotency_retention_hours)
        # A job's profile is made of all its samples, when it has succeeded: until it has ended they stay.
        ended = select(JobRow.id).where(JobRow.id == SampleRow.job_id, JobRow.state.in_(_FINAL)).exists()
        return [
            _Rule("samples", SampleRow, raw, ended),
            _Rule("step_events", EventRow, raw, EventRow.type == "step"),
            _Rule("idempotency_keys", IdempotencyRow, keys, true()),
        ]

    def _batch(self, rule: _Rule, after: tuple[Any, ...] | None) -> tuple[int, tuple[Any, ...] | None]:
        """Deletes one batch; returns how many rows, and where the next one starts, if there may be one."""
        limit = self._settings.prune_batch_rows
        key = tuple(rule.table.__mapper__.primary_key)
        place = (rule.table.created_at, *key)
        old = select(*place).where(rule.table.created_at < rule.before, rule.condition)
        if after is not None:
            old = old.where(tuple_(*place) > after)
        with self._database.write() as session:
            rows = session.execute(
                old.order_by(*place).limit(limit).with_for_update(skip_locked=True, of=rule.table)
            ).all()
            if rows:
                those = (
                    key[0].in_([row[1] for row in rows])
                    if len(key) == 1
                    else tuple_(*key).in_([row[1:] for row in rows])
                )
                session.execute(delete(rule.table).where(those), execution_options={"synchronize_session": False})
        return len(rows), tuple(rows[-1]) if len(rows) == limit else None


class Housekeeper:
    """Prunes in the background, once at the start and then every now and again; keeps statistics fresh."""

    def __init__(self, database: Database, settings: Settings, clock: Clock, metrics: Metrics) -> None:
        self._database = database
        self._retention = Retention(database, settings, clock)
        self._every = settings.prune_every_seconds
        self._metrics = metrics
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeper", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the batch at hand."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                deleted = self._retention.prune(self._stopping, self._count)
                self._database.refresh_statistics()
                if any(deleted.values()):
                    log.info("pruned", **deleted)
            except Exception:
                log.exception("pruning failed; it goes on next time")
            self._stopping.wait(self._every)

    def _count(self, name: str, count: int) -> None:
        self._metrics.pruned_rows.labels(name).inc(count)
