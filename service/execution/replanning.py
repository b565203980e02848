"""Queued jobs whose plan is out of date are planned anew before they start.

A plan is named by all that decides it: the request, the device, the model's config, the calibration, the
planner. What a job's plan would be called now is computed before each of its attempts; another name than its
plan's means that something has changed. Plans are made in threads, in the planner's own processes, and come
back to the supervisor's: meanwhile it follows its attempts, and keeps the device for the job, whose turn it
is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import structlog

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import ScheduleSpec
from chunkplan.planner.catalog import find_gpu
from chunkplan.planner.spec import Plan, PlanRequest
from chunkplan.service.errors import Busy, Unprocessable
from chunkplan.service.job_states import Reason
from chunkplan.service.machines.devices import Device, choose
from chunkplan.service.plans.service import PlanService, content_id

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Planned:
    """A queued job beside its plan."""

    job_id: str
    project: str
    plan_id: str
    request: PlanRequest
    """Request of its plan."""
    gpu: str | dict[str, Any] | None
    """What the user has asked for."""
    schedule: ScheduleSpec
    """That it runs with."""
    upper_bytes: int
    extra_bytes: int
    has_checkpoint: bool
    replan: str | None
    """Why it must be planned anew, whatever its plan would be called."""


@dataclass(frozen=True)
class Replanned:
    """A job's new plan, or why it has none."""

    job: Planned
    device: Device
    why: str
    """``planner`` (or its calibration, or the model), ``device``, ``out_of_memory``."""
    plan: Plan | None = None
    refusal: Reason | None = None
    """None without a plan: nobody knows yet; it may be tried again."""
    detail: str | None = None
    field: str | None = None


def wanted(job: Planned, device: Device, devices: Sequence[Device]) -> PlanRequest:
    """What a job's plan should answer where it is about to start.

    The GPU is the device's unless the user gave another to plan for. Its memory is limited where the operator
    limits it or an attempt ran out of it, and the job would not fit otherwise. A schedule that was chosen
    stays where the job has a checkpoint, which belongs to it, and fits.
    """
    asked, changes = job.request, dict[str, Any]()
    if _follows(job, devices) and find_gpu(asked.gpu) != device.gpu:
        changes["gpu"] = device.gpu
    fits = job.upper_bytes <= device.memory_bytes
    if not fits and (device.limit_bytes is not None or job.extra_bytes):
        limit = max(1, device.memory_bytes - job.extra_bytes)
        changes["memory_limit_bytes"] = min(limit, asked.memory_limit_bytes or limit)
    if asked.training.schedule == "auto" and job.has_checkpoint and fits:
        changes["training"] = asked.training.model_copy(update={"schedule": job.schedule})
    return asked.model_copy(update=changes)


class Replanner:
    """Knows which jobs' plans were looked at, and which ones are being made."""

    def __init__(self, plans: PlanService, devices: Sequence[Device], num_threads: int = 2) -> None:
        self._plans = plans
        self._devices = devices
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="replanner")
        self._current: tuple[str, str, str] | None = None
        """(job, plan, device) of the plan that was just found to be up to date."""
        self._unfit: set[tuple[str, str]] = set()
        """(job, device) where another device can hold the job, and this one, as planned anew, cannot."""
        self._waiting: dict[str, tuple[Device, Future[Replanned]]] = {}

    def is_current(self, job_id: str, plan_id: str, device: Device) -> bool:
        """Whether a job's plan was looked at for a device, last of all, and found to be up to date."""
        return self._current == (job_id, plan_id, device.name)

    def not_for(self, device: Device) -> set[str]:
        """Jobs that a device should pass over: planned for another one right now, or not fit for it."""
        elsewhere = {job_id for job_id, (place, _) in self._waiting.items() if place != device}
        return elsewhere | {job_id for job_id, name in self._unfit if name == device.name}

    def look(self, job: Planned, device: Device) -> Replanned | None:
        """Looks at the plan of the job whose turn it is on a device, and has it made anew where that is
        needed.

        Returns:
            None while the plan is up to date, or being made; otherwise what is known at once.
        """
        if job.job_id in self._waiting:
            return None
        try:
            request = wanted(job, device, self._devices)
            is_same = content_id(request) == job.plan_id
        except InputError as error:
            return _refused(job, device, "planner", error)
        if is_same and job.replan is None:
            self._current = job.job_id, job.plan_id, device.name
            return None
        is_device = request.model_copy(update={"training": job.request.training}) != job.request
        why = job.replan or ("device" if is_device else "planner")
        log.info("planned anew", job_id=job.job_id, why=why, device=device.name)
        self._waiting[job.job_id] = device, self._threads.submit(self._plan, job, device, why, request)
        return None

    def is_waiting(self, device: Device) -> bool:
        """Whether a device waits for the plan of the job whose turn it is there."""
        return any(place == device for place, _ in self._waiting.values())

    def collect(self, apply: Callable[[Replanned], bool]) -> None:
        """Passes on what has come back; ``apply`` says whether the device can hold the job."""
        for job_id, (device, future) in list(self._waiting.items()):
            if future.done():
                del self._waiting[job_id]
                try:
                    fits = apply(future.result())
                except Exception:
                    self._waiting[job_id] = device, future  # the database is away: once more
                    raise
                if not fits:
                    self._unfit.add((job_id, device.name))

    def close(self) -> None:
        """Begins nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _plan(self, job: Planned, device: Device, why: str, request: PlanRequest) -> Replanned:
        try:
            plan = Plan.model_validate(self._plans.plan(job.project, request)[0].plan.plan)
        except InputError as error:
            return _refused(job, device, why, error)
        except Unprocessable as error:
            return Replanned(job, device, why, None, Reason.ERROR, str(error))
        except Busy as error:
            return Replanned(job, device, why, detail=str(error))
        except Exception:
            log.exception("a job could not be planned anew; it is tried again", job_id=job.job_id)
            return Replanned(job, device, why)
        return Replanned(job, device, why, plan)


def _refused(job: Planned, device: Device, why: str, error: InputError) -> Replanned:
    """What the request has wrong is final; what this machine has wrong, such as its calibration, is not the
    job's.
    """
    if error.field.partition(".")[0] in PlanRequest.model_fields:
        return Replanned(job, device, why, None, Reason.INPUT, error.message, error.field)
    log.error("a job could not be planned anew; it is tried again", job_id=job.job_id, error=str(error))
    return Replanned(job, device, why)


def _follows(job: Planned, devices: Sequence[Device]) -> bool:
    """Whether the plan is made for the device that the job runs on."""
    try:
        return choose(devices, job.gpu).given is None
    except InputError:
        return False
