"""What a server process is made of, put together once."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Event

from chunkplan.service.access.limits import Turns
from chunkplan.service.access.service import Access
from chunkplan.service.db import Database
from chunkplan.service.execution.executors.local import LocalExecution
from chunkplan.service.execution.executors.process_identity import ProcessIdentity
from chunkplan.service.execution.replanning import Replanner
from chunkplan.service.execution.supervisor import Supervisor
from chunkplan.service.files.service import FileService
from chunkplan.service.jobs.feed import EventFeed
from chunkplan.service.jobs.repository import JobRepository
from chunkplan.service.jobs.service import JobService
from chunkplan.service.kit.clock import Clock, SystemClock
from chunkplan.service.machines.devices import local_devices
from chunkplan.service.operation.metrics import Metrics, Queue
from chunkplan.service.operation.retention import Housekeeper
from chunkplan.service.plans.planning_process import Planner, PlannerProcess
from chunkplan.service.plans.service import PlanService
from chunkplan.service.settings import Settings


@dataclass(frozen=True)
class Services:
    """Everything that routes and the supervisor use."""

    settings: Settings
    clock: Clock
    database: Database
    planner: Planner
    owns_planner: bool
    """Whether the planner ends with this server."""
    plans: PlanService
    files: FileService
    jobs: JobService
    supervisor: Supervisor
    housekeeper: Housekeeper
    metrics: Metrics
    access: Access
    feed: EventFeed
    plan_turns: Turns
    stream_turns: Turns
    closing: Event
    """Set when the server is about to stop, so that streams end."""

    @property
    def is_working(self) -> bool:
        """Whether jobs are looked after, and the server is not about to stop."""
        return self.supervisor.is_alive() and not self.closing.is_set()


def build_services(settings: Settings, planner: Planner | None = None, clock: Clock | None = None) -> Services:
    """The parts of one server.

    Args:
        settings: where and how.
        planner: one to share; by default the server's own process.
        clock: by default the machine's.
    """
    clock = clock or SystemClock()
    database = Database(settings.database_url, settings.database_timeout_seconds)
    own_planner = PlannerProcess(
        settings.plan_timeout_seconds, settings.plan_queue_seconds, settings.plan_memory_bytes, settings.plan_processes
    )
    metrics = Metrics(lambda: _queue(database), clock)
    plans = PlanService(database, planner or own_planner, settings, clock, metrics)
    files = FileService(database, settings, clock, lambda session, file_id: JobRepository(session).uses_file(file_id))
    devices = local_devices(settings.devices, settings.max_jobs_per_device)
    supervisor = Supervisor(
        database,
        LocalExecution(settings.locks_dir),
        devices,
        settings,
        clock,
        ProcessIdentity.current(),
        metrics,
        Replanner(plans, devices),
    )
    jobs = JobService(database, plans, devices, settings, clock)
    access, closing = Access(database, clock), Event()
    return Services(
        settings=settings,
        clock=clock,
        database=database,
        planner=planner or own_planner,
        owns_planner=planner is None,
        plans=plans,
        files=files,
        jobs=jobs,
        supervisor=supervisor,
        housekeeper=Housekeeper(database, settings, clock, metrics),
        metrics=metrics,
        access=access,
        feed=EventFeed(database, access, settings.poll_seconds, closing),
        plan_turns=Turns("too_many_plans", "requests for plans"),
        stream_turns=Turns("too_many_streams", "event streams"),
        closing=closing,
    )


def _queue(database: Database) -> Queue:
    with database.read() as session:
        jobs = JobRepository(session)
        return jobs.count_by_state(), jobs.oldest_queued_at()
