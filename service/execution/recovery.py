"""Attempts whose server is gone: waited for, killed when they do not go, their last words read, their jobs
queued.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime

import structlog

from chunkplan.service.db.tables import AttemptRow
from chunkplan.service.execution.executors.process_identity import ProcessIdentity
from chunkplan.service.execution.ledger import Handle, Ledger, StaleToken
from chunkplan.service.execution.records.messages import read_messages
from chunkplan.service.job_states import JobState
from chunkplan.service.kit.clock import Clock
from chunkplan.service.operation.metrics import Metrics
from chunkplan.service.settings import Settings

log = structlog.get_logger(__name__)


class Recovery:
    """Finds abandoned attempts and ends them, so that their jobs resume from their last checkpoint.

    An attempt is abandoned when its server was on this host and is gone, or when its lease has run out: when
    this server has watched for a lease's whole time that nobody renewed it. Times of day are not compared:
    clocks differ and jump.
    """

    def __init__(self, ledger: Ledger, settings: Settings, clock: Clock, owner: str, metrics: Metrics) -> None:
        self._ledger = ledger
        self._settings = settings
        self._clock = clock
        self._owner = owner
        self._metrics = metrics
        self._kill_at: dict[str, float] = {}
        self._watched: dict[str, tuple[datetime, float]] = {}
        """By attempt, its lease and since when this server has seen the same one."""
        self._is_tidy = False

    def round(self, followed: Collection[str]) -> None:
        """Looks at every open attempt that this server does not follow."""
        if not self._is_tidy:
            self._remove_leftovers()
            self._is_tidy = True
        attempts = [attempt for attempt in self._ledger.open_attempts() if attempt.id not in followed]
        self._watched = {attempt.id: self._watch(attempt) for attempt in attempts}
        for attempt in attempts:
            if self._is_abandoned(attempt):
                with structlog.contextvars.bound_contextvars(job_id=attempt.job_id, attempt_id=attempt.id):
                    self._recover(attempt)

    def _watch(self, attempt: AttemptRow) -> tuple[datetime, float]:
        lease, now = attempt.lease_expires_at, self._clock.elapsed()
        known, since = self._watched.get(attempt.id, (lease, now))
        return (lease, since) if known == lease else (lease, now)

    def _is_abandoned(self, attempt: AttemptRow) -> bool:
        owner = ProcessIdentity.parse(attempt.owner)
        if attempt.owner == self._owner or (owner.is_local and not owner.is_running()):
            return True
        _, since = self._watched[attempt.id]
        return self._clock.elapsed() - since >= self._settings.lease_seconds

    def _recover(self, attempt: AttemptRow) -> None:
        if self._is_trainer_running(attempt):
            return
        handle = Handle.of(attempt)
        try:
            self._drain(handle, attempt.events_offset)
            finish = self._ledger.finish(handle, None)
        except StaleToken:
            log.info("another server was faster")
            return
        log.warning("abandoned attempt ended", state=finish.outcome.state, detail=finish.outcome.detail)

    def _is_trainer_running(self, attempt: AttemptRow) -> bool:
        """Whether the trainer is still there: the kernel has told it to checkpoint and stop, and it gets the
        time.
        """
        process = ProcessIdentity.parse(attempt.process) if attempt.process else None
        if process is None or not process.is_local or not process.is_running():
            self._kill_at.pop(attempt.id, None)
            return False
        now = self._clock.elapsed()
        if attempt.id not in self._kill_at:
            self._kill_at[attempt.id] = now + self._settings.stop_grace_seconds
            if ProcessIdentity.parse(attempt.owner).is_running():
                # Its server hangs but lives, so the kernel has said nothing to the trainer.
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)
        elif now >= self._kill_at[attempt.id]:
            log.warning("an abandoned trainer did not stop in time; it is killed")
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return True

    def _drain(self, handle: Handle, offset: int) -> None:
        path = self._settings.runs_dir / handle.job_id / "attempts" / str(handle.number) / "events.jsonl"
        while (batch := read_messages(path, offset)).next_offset > offset:
            if self._ledger.ingest(handle, batch, offset):
                self._metrics.drift.labels(handle.device).inc()
            offset = batch.next_offset

    def _remove_leftovers(self) -> None:
        """Checkpoints of jobs that have succeeded: their server died before it got to it."""
        folders = [path.parent for path in self._settings.runs_dir.glob("*/checkpoints")]
        for batch in (folders[i : i + 500] for i in range(0, len(folders), 500)):
            states = self._ledger.states([folder.name for folder in batch])
            for folder in batch:
                if states.get(folder.name) is JobState.SUCCEEDED:
                    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
