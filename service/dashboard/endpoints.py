"""Routes of the dashboards."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Query

from chunkplan.planner.calibration.residuals import STEP
from chunkplan.service.dashboard.repository import DashboardRepository
from chunkplan.service.dashboard.schemas import AccuracyRow, DeviceView, Dimension, Summary, UsageRow
from chunkplan.service.execution.supervisor import Supervisor
from chunkplan.service.http.dependencies import DashboardSession, ServerDep, part
from chunkplan.service.job_states import JobState
from chunkplan.service.jobs.repository import JobRepository
from chunkplan.service.jobs.schemas import JobView
from chunkplan.service.kit.paging import OptionalText, Page
from chunkplan.service.machines.devices import Device
from chunkplan.service.profiles.schemas import ProfileView

router = APIRouter(prefix="/v1/dashboard", tags=["dashboard"])
SupervisorDep = Annotated[Supervisor, part("supervisor")]

_MODEL_AND_GPU = (Dimension.MODEL, Dimension.GPU)
_NUM_LATEST_PROFILES, _NUM_JOBS = 5, 10

Days = Annotated[int, Query(ge=1, le=366, description="how far back, today included")]


@router.get("/summary")
def summary(session: DashboardSession, server: ServerDep, supervisor: SupervisorDep) -> Summary:
    """Jobs by state, the queue, the devices, what ended last. What is planned on a device counts every
    project.
    """
    jobs, board = JobRepository(session), DashboardRepository(session)
    counted = jobs.count_by_state()
    oldest = jobs.oldest_queued_at()
    recent = board.recent(_NUM_JOBS)
    profiles = jobs.profile_ids([row.id for row in recent])
    return Summary(
        jobs={state.value: count for state, count in counted.items()},
        queue_depth=counted[JobState.QUEUED],
        oldest_queued_seconds=None if oldest is None else (server.clock.now() - oldest).total_seconds(),
        queue=[JobView.of(row) for row in board.queue(_NUM_JOBS)],
        active=[JobView.of(row) for row in jobs.active()],
        recent=[JobView.of(row, profiles.get(row.id)) for row in recent],
        devices=_devices(server, supervisor, jobs),
        num_plans=board.count_plans(),
        num_profiles=board.count_profiles(),
        latest_profiles=[ProfileView.of(row) for row in board.latest_profiles(_NUM_LATEST_PROFILES)],
    )


@router.get("/accuracy")
def accuracy(
    session: DashboardSession,
    server: ServerDep,
    by: Annotated[Sequence[Dimension], Query(max_length=4, description="`day` makes a time series")] = _MODEL_AND_GPU,
    phase: Annotated[
        OptionalText, Query(description="only this phase; by default `step`, the whole one, unless grouped by phase")
    ] = None,
    model: OptionalText = None,
    gpu: OptionalText = None,
    days: Days | None = None,
) -> Page[AccuracyRow]:
    """How far plans were from measurements, over the profiles of finished jobs."""
    dimensions = list(dict.fromkeys(by))
    if phase is None and Dimension.PHASE not in dimensions:
        phase = STEP
    since = None if days is None else (server.clock.now() - timedelta(days=days - 1)).date()
    board = DashboardRepository(session)
    return Page.of(board.accuracy(dimensions, phase=phase, model=model, gpu=gpu, since=since))


@router.get("/usage")
def usage(session: DashboardSession, server: ServerDep, days: Days = 30) -> Page[UsageRow]:
    """What ran, by day (UTC) and project; days on which nothing ran are left out."""
    now = server.clock.now()
    return Page.of(DashboardRepository(session).usage((now - timedelta(days=days - 1)).date(), now))


def _devices(server: ServerDep, supervisor: Supervisor, jobs: JobRepository) -> list[DeviceView]:
    with server.database.read() as everything:
        board = DashboardRepository(everything)
        running = board.running_by_device(supervisor.host)
        there = [job_id for found in running.values() for job_id, _ in found]
        measured = {job_id: board.newest_measured_bytes(job_id) for job_id in there}
    visible = jobs.states(there)
    return [_device(device, running.get(device.name, []), measured, visible) for device in supervisor.devices]


def _device(
    device: Device, running: list[tuple[str, int]], measured: Mapping[str, int | None], visible: Container[str]
) -> DeviceView:
    known = [size for job_id, _ in running if (size := measured[job_id]) is not None]
    job_ids = [job_id for job_id, _ in running if job_id in visible]
    return DeviceView(
        name=device.name,
        gpu=device.gpu.name,
        memory_bytes=device.memory_bytes,
        max_jobs=device.max_jobs,
        num_jobs=len(running),
        planned_bytes=sum(upper_bytes for _, upper_bytes in running),
        measured_bytes=sum(known) if known else None,
        job_id=job_ids[0] if job_ids else None,
        job_ids=job_ids,
    )
