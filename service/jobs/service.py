"""Submitting, cancelling, pausing and resuming jobs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy.orm import Session

from chunkplan.engine.spec import JobRequest
from chunkplan.service.db import Database, take_in_turn
from chunkplan.service.db.tables import JobRow
from chunkplan.service.errors import Conflict
from chunkplan.service.job_states import JobState, Reason
from chunkplan.service.jobs.admission import admit, turn_at
from chunkplan.service.jobs.idempotency import IdempotencyKeys, StoredAnswer
from chunkplan.service.jobs.preparation import JobPreparation, PreparedJob
from chunkplan.service.jobs.project_sources import ProjectSources
from chunkplan.service.jobs.repository import JobRepository
from chunkplan.service.jobs.run_spec import settings_warnings
from chunkplan.service.jobs.schemas import DryRun, JobView
from chunkplan.service.jobs.transitions import add_event, transition
from chunkplan.service.kit.clock import Clock
from chunkplan.service.kit.ids import new_id
from chunkplan.service.machines.devices import Device
from chunkplan.service.plans.service import PlanService
from chunkplan.service.settings import Settings

_CLAIM_MARGIN_SECONDS = 60.0
"""On top of the longest plan: reading the dataset, storing the job."""

_CANCEL = {
    JobState.QUEUED: JobState.CANCELLED,
    JobState.PAUSED: JobState.CANCELLED,
    JobState.STARTING: JobState.CANCELLING,
    JobState.RUNNING: JobState.CANCELLING,
    JobState.PAUSING: JobState.CANCELLING,
    JobState.CANCELLING: JobState.CANCELLING,
    JobState.CANCELLED: JobState.CANCELLED,
}
_PAUSE = {
    JobState.QUEUED: JobState.PAUSED,
    JobState.STARTING: JobState.PAUSING,
    JobState.RUNNING: JobState.PAUSING,
    JobState.PAUSING: JobState.PAUSING,
    JobState.PAUSED: JobState.PAUSED,
}
_RESUME = {
    JobState.PAUSED: JobState.QUEUED,
    JobState.QUEUED: JobState.QUEUED,
    JobState.STARTING: JobState.STARTING,
    JobState.RUNNING: JobState.RUNNING,
}


class JobService:
    """What users do with jobs."""

    def __init__(
        self, database: Database, plans: PlanService, devices: Sequence[Device], settings: Settings, clock: Clock
    ) -> None:
        self._database = database
        self._clock = clock
        self._settings = settings
        self._plans = plans
        self._devices = devices
        claim_seconds = settings.plan_timeout_seconds + settings.plan_queue_seconds + _CLAIM_MARGIN_SECONDS
        self._keys = IdempotencyKeys(database, clock, claim_seconds)

    def dry_run(self, project: str, request: JobRequest) -> DryRun:
        """Every check and admission; no job is stored.

        Raises:
            InputError: see `JobPreparation.prepare`.
            DoesNotFit: its plan exceeds the device.
        """
        prepared = self._prepare(project, request)
        return DryRun(
            plan_id=prepared.plan.id,
            predicted_bytes=prepared.plan.peak.upper_bytes,
            available_bytes=min(prepared.plan.capacity_bytes, prepared.choice.device.memory_bytes),
            device_kind=prepared.choice.device.kind,
            num_rows=prepared.num_rows,
            training=prepared.training.model_dump(mode="json"),
            warnings=settings_warnings(
                prepared.training, prepared.dataset_path, prepared.num_rows, request.dataset.held_out_fraction
            ),
        )

    def submit(self, project: str, request: JobRequest, idempotency_key: str | None) -> StoredAnswer:
        """Checks, plans, admits and queues a job; at most once for an idempotency key.

        Raises:
            InputError: see `JobPreparation.prepare`.
            DoesNotFit: its plan exceeds the device.
            Conflict: the key's first request is still in flight, or the project has too many unfinished jobs.
            Unprocessable: the key was used with another body.
        """
        if idempotency_key is None:
            prepared = self._prepare(project, request)
            with self._database.of(project).write() as session:
                return self._add(session, project, prepared)
        body_sha256 = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
        claim = self._keys.claim(project, idempotency_key, body_sha256)
        if isinstance(claim, StoredAnswer):
            return claim
        try:
            prepared = self._prepare(project, request)
            with self._database.of(project).write() as session:
                answer = self._add(session, project, prepared)
                self._keys.answer(session, claim, answer)
        except BaseException:
            self._keys.release(claim)
            raise
        return answer

    def _prepare(self, project: str, request: JobRequest) -> PreparedJob:
        """A job that was checked, planned and admitted."""
        sources = ProjectSources(project, self._database, self._plans, self._settings)
        prepared = JobPreparation(sources, self._devices).prepare(request)
        admit(prepared.plan, prepared.choice.device.memory_bytes)
        return prepared

    def cancel(self, session: Session, job_id: str) -> JobRow:
        """Ends a job: at once when it waits, through its trainer when it runs. What it made stays.

        Raises:
            NotFound: there is no such job.
            Conflict: it has ended otherwise.
        """
        return self._steer(session, job_id, _CANCEL, JobState.CANCELLED)

    def pause(self, session: Session, job_id: str) -> JobRow:
        """Stops a job at a checkpoint until it is resumed; raises as `cancel` does."""
        return self._steer(session, job_id, _PAUSE, JobState.PAUSED)

    def resume(self, session: Session, job_id: str) -> JobRow:
        """Queues a paused job again; raises as `cancel` does."""
        return self._steer(session, job_id, _RESUME, JobState.QUEUED)

    def _steer(self, session: Session, job_id: str, moves: dict[JobState, JobState], goal: JobState) -> JobRow:
        job, now = JobRepository(session).lock(job_id), self._clock.now()
        to = moves.get(job.state, goal)
        if to is not job.state:
            transition(session, job, to, Reason.USER, now=now)
            job.not_before = now
        return job

    def _add(self, session: Session, project: str, prepared: PreparedJob) -> StoredAnswer:
        jobs = JobRepository(session)
        self._check_quota(session, project, jobs)
        job = self._job(project, prepared, jobs.output_names)
        jobs.add(job)
        data: dict[str, Any] = {
            "from": None,
            "state": job.state.value,
            "reason": job.reason.value,
            "detail": None,
            "plan_id": job.plan_id,
            "predicted_bytes": prepared.plan.peak.upper_bytes,
        }
        add_event(session, job, "state", data, now=job.created_at)
        return StoredAnswer(201, f"/v1/jobs/{job.id}", JobView.of(job).model_dump(mode="json"))

    def _check_quota(self, session: Session, project: str, jobs: JobRepository) -> None:
        limit = self._settings.quota_of(project).max_open_jobs
        take_in_turn(session, project)
        if jobs.count_unfinished() >= limit:
            raise Conflict("quota_exceeded", f"{limit} jobs of this project have not ended yet, and that is its limit")

    def _job(self, project: str, prepared: PreparedJob, taken: Callable[[str], list[str]]) -> JobRow:
        request, now = prepared.request, self._clock.now()
        job_id = new_id("job", now)
        return JobRow(
            id=job_id,
            project=project,
            name=request.name,
            state=JobState.QUEUED,
            reason=Reason.SUBMITTED,
            model=prepared.model,
            gpu=prepared.choice.gpu.name,
            device=prepared.choice.asked,
            priority=request.priority,
            turn_at=turn_at(now, request.priority, self._settings.priority_point_seconds),
            plan_id=prepared.plan.id,
            upper_bytes=prepared.plan.peak.upper_bytes,
            file_id=request.dataset.file_id,
            request=request.model_dump(mode="json"),
            run_spec=prepared.run_spec(job_id, taken).model_dump(mode="json"),
            step=0,
            num_attempts=0,
            num_failures=0,
            last_event=0,
            created_at=now,
            not_before=now,
        )
