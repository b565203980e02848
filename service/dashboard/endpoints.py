"""Routes of the dashboards."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Query

from service.dashboard.repository import DashboardRepository
from service.dashboard.schemas import AccuracyRow, DeviceView, Summary, UsageRow
from service.dependencies import DashboardSession, ServicesDep
from service.jobs.repository import JobRepository
from service.jobs.schemas import JobView
from service.jobs.states import JobState
from service.paging import Page
from service.profiles.repository import ProfileRepository
from service.profiles.schemas import ProfileView

router = APIRouter(prefix="/v1/dashboard", tags=["dashboard"])

_LATEST = 5


@router.get("/summary")
def summary(session: DashboardSession, services: ServicesDep) -> Summary:
    """Jobs by state, the queue, the devices, the latest profiles. What is planned on a device counts every project."""
    jobs, board = JobRepository(session), DashboardRepository(session)
    counted = jobs.count_by_state()
    oldest = jobs.oldest_queued_at()
    with services.database.read() as everything:
        planned = DashboardRepository(everything).planned_by_device(services.supervisor.owner)
    visible = jobs.states([job_id for job_id, _ in planned.values()])
    return Summary(
        jobs={state.value: count for state, count in counted.items()},
        queue_depth=counted[JobState.QUEUED],
        oldest_queued_seconds=None if oldest is None else (services.clock.now() - oldest).total_seconds(),
        active=[JobView.of(row) for row in jobs.active()],
        devices=[
            DeviceView(
                name=device.name,
                gpu=device.gpu.name,
                memory_bytes=device.memory_bytes,
                planned_bytes=planned_bytes,
                job_id=job_id if job_id in visible else None,
            )
            for device in services.supervisor.devices
            for job_id, planned_bytes in [planned.get(device.name, (None, 0))]
        ],
        num_plans=board.count_plans(),
        num_profiles=board.count_profiles(),
        latest_profiles=[ProfileView.of(row) for row in ProfileRepository(session).latest(_LATEST)],
    )


@router.get("/accuracy")
def accuracy(session: DashboardSession) -> Page[AccuracyRow]:
    """How far plans were from measurements, by model and device kind."""
    return Page.of(DashboardRepository(session).accuracy())


@router.get("/usage")
def usage(
    session: DashboardSession, services: ServicesDep, days: Annotated[int, Query(ge=1, le=366)] = 30
) -> Page[UsageRow]:
    """What ran, by day (UTC)."""
    return Page.of(DashboardRepository(session).usage(services.clock.now() - timedelta(days=days)))
