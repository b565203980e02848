"""The planner in processes of its own: warm, bounded in time and memory. The server itself never imports
torch.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import resource
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

from chunkplan.engine.errors import InputError
from chunkplan.planner.report.formats import Format
from chunkplan.planner.spec import Plan, PlanRequest, Timeline
from chunkplan.service.errors import Busy, Unprocessable
from chunkplan.service.kit.collector import collect_rarely

log = structlog.get_logger(__name__)


class Planner(Protocol):
    """What the service needs of a planner."""

    def plan(self, request: PlanRequest) -> Plan:
        """The plan of a request."""

    def timeline(self, request: PlanRequest) -> Timeline:
        """The footprint of a request over one cycle."""

    def export(self, plan: Plan, form: Format, chunk_index: int | None) -> bytes:
        """A plan's footprint in a format of `chunkplan.planner.report.formats`."""

    def close(self) -> None:
        """Ends the worker process."""


@dataclass(frozen=True)
class _Worker:
    pool: ProcessPoolExecutor
    pid: int


class PlannerProcess:
    """Runs `planner.plan`, `planner.timeline` and exports in spawned processes, one request at a time in
    each.

    Args:
        timeout_seconds: a request that takes longer is given up and its process killed.
        queue_seconds: how long a request waits for its turn.
        memory_bytes: data that a process may hold; a request that needs more is given up with its process.
        num_processes: started when they are needed; the one that worked last takes the next request.
    """

    def __init__(
        self, timeout_seconds: float, queue_seconds: float, memory_bytes: int | None = None, num_processes: int = 1
    ) -> None:
        self._queue_seconds = queue_seconds
        self._num_processes = num_processes
        self._idle: queue.LifoQueue[_ProcessLane] = queue.LifoQueue()
        for _ in range(num_processes):
            self._idle.put(_ProcessLane(timeout_seconds, memory_bytes))

    def plan(self, request: PlanRequest) -> Plan:
        """See `planner.plan`.

        Raises:
            InputError: the planner refuses the request.
            Unprocessable: it took too long, or too much memory.
            Busy: others are waiting already.
        """
        return Plan.model_validate_json(self._call(_plan, request))

    def timeline(self, request: PlanRequest) -> Timeline:
        """See `planner.timeline`; raises as `plan` does."""
        return Timeline.model_validate_json(self._call(_timeline, request))

    def export(self, plan: Plan, form: Format, chunk_index: int | None) -> bytes:
        """See `chunkplan.planner.report.formats.export`; raises as `plan` does."""
        answer = self._call(partial(_export, form, chunk_index), plan)
        assert isinstance(answer, bytes)
        return answer

    def close(self) -> None:
        """Ends the worker processes."""
        lanes = [self._idle.get() for _ in range(self._num_processes)]
        for lane in lanes:
            lane.kill()
            self._idle.put(lane)

    def _call(self, function: Callable[[str], Answer], request: BaseModel) -> str | bytes:
        try:
            lane = self._idle.get(timeout=self._queue_seconds)
        except queue.Empty as error:
            message = "other plans are being computed; try again soon"
            raise Busy("planner_busy", message, retry_after_seconds=10) from error
        try:
            status, *rest = lane.run(function, request.model_dump_json())
        finally:
            self._idle.put(lane)
        if status == "input":
            raise InputError(str(rest[0]), str(rest[1]))
        return rest[0]


class _ProcessLane:
    """One process, which may be dead or not started yet."""

    def __init__(self, timeout_seconds: float, memory_bytes: int | None) -> None:
        self._timeout_seconds = timeout_seconds
        self._memory_bytes = memory_bytes
        self._worker: _Worker | None = None

    def run(self, function: Callable[[str], Answer], request: str) -> Answer:
        """One try, and another in a fresh process if the first one's died: not every death is the request's
        fault.
        """
        try:
            return self._try(function, request)
        except BrokenProcessPool:
            log.warning("the planner's process died")
            self.kill()
        try:
            return self._try(function, request)
        except BrokenProcessPool as error:
            self.kill()
            raise Unprocessable("plan_failed", "the planner's process died on this request, twice") from error

    def _try(self, function: Callable[[str], Answer], request: str) -> Answer:
        self._worker = self._worker or _start_worker(self._memory_bytes)
        try:
            answer = self._worker.pool.submit(function, request).result(timeout=self._timeout_seconds)
        except TimeoutError as error:
            self.kill()
            message = f"this plan takes longer than {self._timeout_seconds:g} seconds; ask for a smaller one"
            raise Unprocessable("plan_timeout", message) from error
        if answer == _OUT_OF_MEMORY:
            self.kill()
            message = f"this plan takes more than {self._memory_bytes} bytes of memory; ask for a smaller one"
            raise Unprocessable("plan_memory", message)
        return answer

    def kill(self) -> None:
        """Ends the process at once, whatever it is doing."""
        worker, self._worker = self._worker, None
        if worker is not None:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
            worker.pool.shutdown(wait=True, cancel_futures=True)


_NICENESS = 10
"""Whoever waits for a plan waits for seconds; others' requests should not, where all processors plan."""
_START_SECONDS = 60.0
"""For a new process to answer for the first time."""


def _start_worker(memory_bytes: int | None) -> _Worker:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=context, initializer=_initialise, initargs=(memory_bytes,))
    try:
        return _Worker(pool, pool.submit(os.getpid).result(timeout=_START_SECONDS))
    except TimeoutError as error:
        pool.shutdown(wait=False, cancel_futures=True)
        raise Busy("planner_slow", "this machine is too busy to start a planner", retry_after_seconds=60) from error


Answer = tuple[str | bytes, ...]
"""``("ok", json or file)``, ``("input", field, message)`` or that memory ran out."""

_OUT_OF_MEMORY: Answer = ("memory",)


def _initialise(memory_bytes: int | None) -> None:
    """In the new process: take no more memory than allowed, give way to the server, leave Ctrl-C to it, and
    never outlive it.
    """
    os.nice(_NICENESS)
    collect_rarely()
    if memory_bytes is not None:
        # Data, not address space: torch maps gigabytes that it never touches.
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, most))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True, name="follow-parent").start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _plan(request: str) -> Answer:
    from chunkplan import planner

    return _answer(lambda: planner.plan(PlanRequest.model_validate_json(request)).model_dump_json())


def _timeline(request: str) -> Answer:
    from chunkplan import planner

    return _answer(lambda: planner.timeline(PlanRequest.model_validate_json(request)).model_dump_json())


def _export(form: Format, chunk_index: int | None, plan: str) -> Answer:
    from chunkplan.planner.report.formats import export

    return _answer(lambda: export(Plan.model_validate_json(plan), form, chunk_index))


def _answer(compute: Callable[[], str | bytes]) -> Answer:
    try:
        return "ok", compute()
    except Exception as error:
        if _ran_out_of_memory(error):
            return _OUT_OF_MEMORY
        if isinstance(error, InputError):
            return "input", error.field, error.message
        raise


def _ran_out_of_memory(error: BaseException | None) -> bool:
    """Also when a library has made another error of it, and the planner a refusal of that.

    Python says SystemError where C code failed and named no reason, which it does when it has no memory for
    one.
    """
    while error is not None:
        if isinstance(error, MemoryError | SystemError) or any(
            sign in str(error) for sign in ("bad_alloc", "allocate memory")
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
