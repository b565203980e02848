"""The loop that starts, follows, stops and buries attempts.

One thread per server. It holds no transaction while it waits, and its memory is only a cache: after a crash
everything is found again in the database and in the attempts' event files.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from chunkplan.engine.process.device_lock import Share
from chunkplan.engine.protocol import StepEvent
from chunkplan.planner.calibration.residuals import STEP
from chunkplan.service.db import Database
from chunkplan.service.execution.dispatch import Dispatcher
from chunkplan.service.execution.executors.process_identity import ProcessIdentity
from chunkplan.service.execution.executors.protocol import Execution, Launch
from chunkplan.service.execution.ledger import Claimed, Handle, Ledger, StaleToken
from chunkplan.service.execution.records.messages import read_messages
from chunkplan.service.execution.recovery import Recovery
from chunkplan.service.execution.replanning import Replanner
from chunkplan.service.job_states import JobState
from chunkplan.service.kit.clock import Clock
from chunkplan.service.machines.devices import Device
from chunkplan.service.operation.metrics import Metrics
from chunkplan.service.settings import Settings

log = structlog.get_logger(__name__)


@dataclass
class Following:
    """An attempt of this server."""

    handle: Handle
    process: str
    lease_until: float
    """By `Clock.elapsed`, as `kill_at`."""
    upper_bytes: int
    """What it may take of its device."""
    measured_bytes: int = 0
    """Its highest allocation in its newest step."""
    offset: int | None = 0
    """Up to where its event file is in the database; None when that has to be looked up."""
    has_begun: bool = False
    """Set when its process is on record."""
    kill_at: float | None = None
    """Set when it was asked to stop."""


class Supervisor:
    """Looks after the attempts on this host's devices."""

    def __init__(
        self,
        database: Database,
        execution: Execution,
        devices: Sequence[Device],
        settings: Settings,
        clock: Clock,
        identity: ProcessIdentity,
        metrics: Metrics,
        replanner: Replanner,
    ) -> None:
        self.devices = devices
        self.owner, self.host = str(identity), identity.host
        self._ledger = Ledger(database, settings, clock, self.owner)
        self._execution = execution
        self._recovery = Recovery(self._ledger, settings, clock, self.owner, metrics)
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._dispatcher = Dispatcher(self._ledger, replanner, devices)
        self._following: dict[str, Following] = {}
        self._recover_at = clock.elapsed()
        self._has_told_of_full_disk = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._is_queue_ordered = False

    def start(self) -> None:
        """Starts the thread. Attempts are started from it and nowhere else: they die with it."""
        self._thread.start()

    def stop(self) -> None:
        """Stops running attempts at a checkpoint, queues their jobs again, and ends the thread."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self._dispatcher.close()

    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._guarded_tick()
            self._stopping.wait(self._settings.poll_seconds)
        while self._following:
            self._guarded_tick()
            threading.Event().wait(self._settings.poll_seconds)

    def _guarded_tick(self) -> None:
        try:
            self.tick()
        except Exception:
            # The database may be away for a while: what was not written is written at the next tick.
            log.exception("the supervisor's round failed")
            for following in self._following.values():
                following.offset = None  # a commit that was not answered may have been one
            self._stop_without_lease()
            if self._stopping.is_set():
                self._stop_without_database()

    def tick(self) -> None:
        """One round: follow, renew, recover, start."""
        states = self._ledger.states([following.handle.job_id for following in self._following.values()])
        for following in list(self._following.values()):
            with structlog.contextvars.bound_contextvars(
                job_id=following.handle.job_id, attempt_id=following.handle.attempt_id
            ):
                self._follow(following, states[following.handle.job_id])
        self._renew()
        if self._stopping.is_set():
            return
        if not self._is_queue_ordered:
            self._ledger.order_queue()
            self._is_queue_ordered = True
        now = self._clock.elapsed()
        if now >= self._recover_at:
            self._recover_at = now + self._settings.poll_seconds * 4
            self._recovery.round(set(self._following))
        self._dispatch()

    def _follow(self, following: Following, state: JobState) -> None:
        """Writes what an attempt has reported, ends it when it has ended, stops it when it should."""
        attempt_id = following.handle.attempt_id
        exit_code = self._execution.status(attempt_id).exit_code  # asked first: nothing is reported after the end
        try:
            if not following.has_begun:
                self._begin(following)
            self._drain(following)
            if exit_code is not None:
                self._bury(following, exit_code)
                return
        except StaleToken:
            log.warning("the attempt is not ours any more; it is killed")
            self._execution.kill(attempt_id)
            if exit_code is not None:
                self._forget(following)
            return
        if self._stopping.is_set() or state in {JobState.CANCELLING, JobState.PAUSING}:
            self._stop(following)

    def _drain(self, following: Following) -> None:
        path = self._attempt_dir(following.handle) / "events.jsonl"
        if following.offset is None:
            following.offset = self._ledger.offset(following.handle)
        while (batch := read_messages(path, following.offset)).next_offset > following.offset:
            if self._ledger.ingest(following.handle, batch, following.offset):
                self._metrics.drift.labels(following.handle.device).inc()
            following.offset = batch.next_offset
            steps = [message for message in batch.messages if isinstance(message, StepEvent)]
            if steps and steps[-1].samples:
                following.measured_bytes = max(sample.allocated_bytes for sample in steps[-1].samples)
                self._count(following.handle.device)

    def _bury(self, following: Following, exit_code: int) -> None:
        handle = following.handle
        last_words = _last_line(self._attempt_dir(handle) / "log.txt")
        finish = self._ledger.finish(handle, exit_code, last_words=last_words, server_stopping=self._stopping.is_set())
        self._forget(following)
        log.info("attempt ended", exit_code=exit_code, state=finish.outcome.state, reason=finish.outcome.reason)
        if finish.outcome.state is JobState.SUCCEEDED:
            # Nothing resumes from them any more; what stays is the exported model.
            shutil.rmtree(self._settings.runs_dir / handle.job_id / "checkpoints", ignore_errors=True)
        if finish.outcome.out_of_memory:
            self._metrics.out_of_memory.labels(handle.device).inc()
        for residual in finish.profile.residuals if finish.profile else []:
            if residual["phase"] == STEP:
                self._metrics.residual.observe(residual["relative_error"])

    def _forget(self, following: Following) -> None:
        self._execution.forget(following.handle.attempt_id)
        del self._following[following.handle.attempt_id]
        self._count(following.handle.device)

    def _count(self, device: str) -> None:
        """Tells the metrics what runs on a device."""
        there = [following for following in self._following.values() if following.handle.device == device]
        self._metrics.planned_bytes.labels(device).set(sum(following.upper_bytes for following in there))
        self._metrics.measured_bytes.labels(device).set(sum(following.measured_bytes for following in there))

    def _stop(self, following: Following) -> None:
        """Asks once; kills when the time of grace is over."""
        now = self._clock.elapsed()
        if following.kill_at is None:
            following.kill_at = now + self._settings.stop_grace_seconds
            self._execution.stop(following.handle.attempt_id)
        elif now >= following.kill_at:
            log.warning("the attempt did not stop in time; it is killed")
            self._execution.kill(following.handle.attempt_id)

    def _renew(self) -> None:
        now = self._clock.elapsed()
        due = self._settings.lease_seconds * 2 / 3
        if all(following.lease_until - now >= due for following in self._following.values()):
            return
        own = self._ledger.renew(list(self._following))
        for attempt_id, following in self._following.items():
            if attempt_id in own:
                following.lease_until = now + self._settings.lease_seconds
            else:
                log.warning("another server has taken the attempt over; it is killed", attempt_id=attempt_id)
                self._execution.kill(attempt_id)

    def _stop_without_lease(self) -> None:
        """An attempt whose lease could not be renewed may be started elsewhere: it must not go on here."""
        now = self._clock.elapsed()
        for following in self._following.values():
            if now >= following.lease_until:
                log.warning("lease lost", attempt_id=following.handle.attempt_id)
                self._execution.kill(following.handle.attempt_id)

    def _stop_without_database(self) -> None:
        """Ends the attempts with the server; whoever comes next reads their last words and queues
        their jobs.
        """
        for following in list(self._following.values()):
            if self._execution.status(following.handle.attempt_id).exit_code is None:
                self._stop(following)
            else:
                self._forget(following)

    def _has_room(self) -> bool:
        """Whether the disk has room: on a full one every queued job would fail, one after the other."""
        self._settings.runs_dir.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(self._settings.runs_dir).free
        has_room = free_bytes >= self._settings.min_free_bytes
        if not has_room and not self._has_told_of_full_disk:
            log.warning("the disk is full: no job is started", free_bytes=free_bytes)
        self._has_told_of_full_disk = not has_room
        return has_room

    def _dispatch(self) -> None:
        self._dispatcher.collect()
        if not self._has_room():
            return
        for device in self.devices:
            while self._num_jobs(device) < device.max_jobs:
                lease_until = self._lease_until()
                claimed = self._dispatcher.claim(device)
                if claimed is None:
                    break
                self._launch(claimed, device, lease_until)

    def _num_jobs(self, device: Device) -> int:
        return sum(following.handle.device == device.name for following in self._following.values())

    def _lease_until(self) -> float:
        """Return the end of a lease that is written next: counted from before, so that it is over
        here first.
        """
        return self._clock.elapsed() + self._settings.lease_seconds

    def _launch(self, claimed: Claimed, device: Device, lease_until: float) -> None:
        handle = claimed.handle
        run_dir = self._settings.runs_dir / handle.job_id
        share = Share(claimed.upper_bytes, device.memory_bytes, device.max_jobs) if device.max_jobs > 1 else None
        with structlog.contextvars.bound_contextvars(job_id=handle.job_id, attempt_id=handle.attempt_id):
            try:
                _leave_other_schedules(run_dir, claimed.run_spec)
                _write_json(run_dir / "job.json", claimed.run_spec)
                status = self._execution.start(Launch(handle.attempt_id, run_dir, handle.number, handle.device, share))
            except OSError as error:
                log.exception("the attempt could not be started")
                self._ledger.finish(handle, 1, last_words=str(error))
                return
            following = Following(handle, status.process, lease_until, claimed.upper_bytes)
            self._following[handle.attempt_id] = following
            self._count(handle.device)
            self._begin(following)

    def _begin(self, following: Following) -> None:
        """Records the attempt's process, and only then lets it do anything: nothing runs that nobody would
        find.
        """
        handle = following.handle
        self._ledger.record_process(handle, following.process)
        self._execution.begin(handle.attempt_id)
        following.has_begun = True
        log.info("attempt started", number=handle.number, device=handle.device, process=following.process)

    def _attempt_dir(self, handle: Handle) -> Path:
        return self._settings.runs_dir / handle.job_id / "attempts" / str(handle.number)


def _last_line(path: Path, max_bytes: int = 4096) -> str | None:
    """The last line of a log that says something."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - max_bytes))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return None
    return next((line.replace("\x00", "")[:1000] for line in reversed(lines) if line), None)


def _leave_other_schedules(run_dir: Path, run_spec: dict[str, Any]) -> None:
    """Removes checkpoints of a run with another schedule: they belong to other chunks, and it begins anew."""
    try:
        before = json.loads((run_dir / "job.json").read_text())
    except FileNotFoundError:
        return
    if before["training"]["schedule"] != run_spec["training"]["schedule"]:
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)


def _write_json(path: Path, value: object) -> None:
    """Written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(path)
