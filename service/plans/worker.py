"""The planner in a process of its own: warm, bounded in time, replaceable. The server itself never imports torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import structlog
from pydantic import BaseModel

from engine.errors import InputError
from planner.exports import Format
from planner.spec import Plan, PlanRequest, Timeline
from service.errors import Busy, Unprocessable

log = structlog.get_logger(__name__)


class Planner(Protocol):
    """What the service needs of a planner."""

    def plan(self, request: PlanRequest) -> Plan:
        """The plan of a request."""

    def timeline(self, request: PlanRequest) -> Timeline:
        """The footprint of a request over one cycle."""

    def export(self, plan: Plan, form: Format, chunk_index: int | None) -> bytes:
        """A plan's footprint in a format of `planner.exports`."""

    def close(self) -> None:
        """Ends the worker process."""


@dataclass(frozen=True)
class _Worker:
    pool: ProcessPoolExecutor
    pid: int


class PlannerProcess:
    """Runs `planner.plan`, `planner.timeline` and exports in one spawned process, one request at a time.

    Args:
        timeout_seconds: a request that takes longer is given up and its process killed.
        queue_seconds: how long a request waits for its turn.
    """

    def __init__(self, timeout_seconds: float, queue_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._queue_seconds = queue_seconds
        self._turn = threading.Lock()
        self._worker: _Worker | None = None

    def plan(self, request: PlanRequest) -> Plan:
        """See `planner.plan`.

        Raises:
            InputError: the planner refuses the request.
            Unprocessable: it took too long.
            Busy: others are waiting already.
        """
        return Plan.model_validate_json(self._call(_plan, request))

    def timeline(self, request: PlanRequest) -> Timeline:
        """See `planner.timeline`; raises as `plan` does."""
        return Timeline.model_validate_json(self._call(_timeline, request))

    def export(self, plan: Plan, form: Format, chunk_index: int | None) -> bytes:
        """See `planner.exports.export`; raises as `plan` does."""
        answer = self._call(partial(_export, form, chunk_index), plan)
        assert isinstance(answer, bytes)
        return answer

    def close(self) -> None:
        """Ends the worker process."""
        with self._turn:
            self._kill()

    def _call(self, function: Callable[[str], Answer], request: BaseModel) -> str | bytes:
        if not self._turn.acquire(timeout=self._queue_seconds):
            raise Busy("planner_busy", "other plans are being computed; try again soon", retry_after_seconds=10)
        try:
            status, *rest = self._run(function, request.model_dump_json())
        finally:
            self._turn.release()
        if status == "input":
            raise InputError(str(rest[0]), str(rest[1]))
        return rest[0]

    def _run(self, function: Callable[[str], Answer], request: str) -> Answer:
        """One try, and another in a fresh process if the first one's died: not every death is the request's fault."""
        try:
            return self._try(function, request)
        except BrokenProcessPool:
            log.warning("the planner's process died")
            self._kill()
        try:
            return self._try(function, request)
        except BrokenProcessPool as error:
            self._kill()
            raise Unprocessable("plan_failed", "the planner's process died on this request, twice") from error

    def _try(self, function: Callable[[str], Answer], request: str) -> Answer:
        self._worker = self._worker or _start_worker()
        try:
            return self._worker.pool.submit(function, request).result(timeout=self._timeout_seconds)
        except TimeoutError as error:
            self._kill()
            message = f"this plan takes longer than {self._timeout_seconds:g} seconds; ask for a smaller one"
            raise Unprocessable("plan_timeout", message) from error

    def _kill(self) -> None:
        """Ends the process at once, whatever it is doing."""
        worker, self._worker = self._worker, None
        if worker is not None:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
            worker.pool.shutdown(wait=True, cancel_futures=True)


_START_SECONDS = 60.0
"""For a new process to answer for the first time."""


def _start_worker() -> _Worker:
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_initialise)
    try:
        return _Worker(pool, pool.submit(os.getpid).result(timeout=_START_SECONDS))
    except TimeoutError as error:
        pool.shutdown(wait=False, cancel_futures=True)
        raise Busy("planner_slow", "this machine is too busy to start a planner", retry_after_seconds=60) from error


Answer = tuple[str | bytes, ...]
"""``("ok", json or file)`` or ``("input", field, message)``."""


def _initialise() -> None:
    """In the new process: leave Ctrl-C to the server, and never outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True, name="follow-parent").start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _plan(request: str) -> Answer:
    import planner

    return _answer(lambda: planner.plan(PlanRequest.model_validate_json(request)).model_dump_json())


def _timeline(request: str) -> Answer:
    import planner

    return _answer(lambda: planner.timeline(PlanRequest.model_validate_json(request)).model_dump_json())


def _export(form: Format, chunk_index: int | None, plan: str) -> Answer:
    from planner.exports import export

    return _answer(lambda: export(Plan.model_validate_json(plan), form, chunk_index))


def _answer(compute: Callable[[], str | bytes]) -> Answer:
    try:
        return "ok", compute()
    except InputError as error:
        return "input", error.field, error.message
