"""Routes of jobs."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Body, Header, Query
from starlette.responses import FileResponse, JSONResponse, Response

from chunkplan.engine.spec import JobRequest
from chunkplan.service.db.tables import JobRow
from chunkplan.service.files.paths import artifact_file
from chunkplan.service.http.dependencies import (
    CONTENT,
    CallerDep,
    PlanTurn,
    ReadSession,
    ServerDep,
    WriteSession,
    part,
)
from chunkplan.service.http.examples import JOB
from chunkplan.service.job_states import JobState
from chunkplan.service.jobs.idempotency import HEADER
from chunkplan.service.jobs.repository import JobRepository
from chunkplan.service.jobs.schemas import (
    ArtifactView,
    AttemptView,
    CheckpointView,
    DryRun,
    EventView,
    JobView,
    MetricView,
)
from chunkplan.service.jobs.service import JobService
from chunkplan.service.kit.paging import LongWindowDep, OptionalText, Page, WindowDep

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
JobsDep = Annotated[JobService, part("jobs")]


@router.post("", response_model=JobView, status_code=201, responses={200: {"model": DryRun}}, dependencies=[PlanTurn])
def submit_job(
    request: Annotated[JobRequest, Body(examples=[JOB])],
    jobs: JobsDep,
    caller: CallerDep,
    dry_run: Annotated[bool, Query(description="check, plan and admit; store no job")] = False,
    idempotency_key: Annotated[str | None, Header(alias=HEADER)] = None,
) -> Response:
    """Submit a job: 201 with Location. It is planned and admitted first; what does not fit is refused with
    409.
    """
    if dry_run:
        return JSONResponse(jobs.dry_run(caller.project, request).model_dump(mode="json"))
    answer = jobs.submit(caller.project, request, idempotency_key)
    headers = {"Location": answer.location} if answer.location else {}
    if answer.replayed:
        headers["Idempotency-Replayed"] = "true"
    return JSONResponse(answer.body, status_code=answer.status_code, headers=headers)


@router.get("")
def list_jobs(
    session: ReadSession, window: WindowDep, state: JobState | None = None, model: OptionalText = None
) -> Page[JobView]:
    """Jobs, newest first."""
    jobs = JobRepository(session)
    rows, has_more = jobs.page(window, state=state, model=model)
    profiles = jobs.profile_ids([row.id for row in rows])
    return Page.of([JobView.of(row, profiles.get(row.id)) for row in rows], has_more=has_more)


@router.get("/{job_id}")
def show_job(job_id: str, session: ReadSession) -> JobView:
    """One job."""
    jobs = JobRepository(session)
    return _view(jobs, jobs.get(job_id))


@router.post("/{job_id}/cancel", status_code=202)
def cancel_job(job_id: str, session: WriteSession, jobs: JobsDep) -> JobView:
    """Cancel; safe to repeat. A running job stops after its current update, and what it made stays."""
    return _view(JobRepository(session), jobs.cancel(session, job_id))


@router.post("/{job_id}/pause", status_code=202)
def pause_job(job_id: str, session: WriteSession, jobs: JobsDep) -> JobView:
    """Pause at a checkpoint; safe to repeat."""
    return _view(JobRepository(session), jobs.pause(session, job_id))


@router.post("/{job_id}/resume", status_code=202)
def resume_job(job_id: str, session: WriteSession, jobs: JobsDep) -> JobView:
    """Queue a paused job again; safe to repeat."""
    return _view(JobRepository(session), jobs.resume(session, job_id))


@router.get("/{job_id}/attempts")
def list_attempts(job_id: str, session: ReadSession, window: WindowDep) -> Page[AttemptView]:
    """The processes that ran the job, newest first."""
    jobs = JobRepository(session)
    rows, has_more = jobs.attempts(jobs.get(job_id).id, window)
    return Page.of([AttemptView.of(row) for row in rows], has_more=has_more)


@router.get("/{job_id}/events")
def list_events(job_id: str, session: ReadSession, window: LongWindowDep) -> Page[EventView]:
    """What happened, in order. ``/events/stream`` sends the same rows as they come."""
    jobs = JobRepository(session)
    rows, has_more = jobs.events(jobs.get(job_id).id, window)
    return Page.of([EventView.of(row) for row in rows], has_more=has_more)


@router.get("/{job_id}/metrics")
def list_metrics(
    job_id: str, session: ReadSession, window: LongWindowDep, kind: Literal["train", "eval"] | None = None
) -> Page[MetricView]:
    """The loss curve, in order."""
    jobs = JobRepository(session)
    rows, has_more = jobs.metrics(jobs.get(job_id).id, window, kind)
    return Page.of([MetricView.of(row) for row in rows], has_more=has_more)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(job_id: str, session: ReadSession, window: WindowDep) -> Page[CheckpointView]:
    """Checkpoints, newest first."""
    jobs = JobRepository(session)
    rows, has_more = jobs.checkpoints(jobs.get(job_id).id, window)
    return Page.of([CheckpointView.of(row) for row in rows], has_more=has_more)


@router.get("/{job_id}/artifacts")
def list_artifacts(job_id: str, session: ReadSession) -> Page[ArtifactView]:
    """What the job made, by name."""
    jobs = JobRepository(session)
    return Page.of([ArtifactView.of(row) for row in jobs.artifacts(jobs.get(job_id).id)])


@router.get("/{job_id}/artifacts/{name:path}", response_class=FileResponse, responses=CONTENT)
def download_artifact(job_id: str, name: str, session: ReadSession, server: ServerDep) -> FileResponse:
    """The content of an artifact; ranges are honoured."""
    jobs = JobRepository(session)
    row = jobs.artifact(jobs.get(job_id).id, name)
    path = artifact_file(server.settings.runs_dir / job_id, row)
    headers = {"ETag": f'"{row.sha256}"'}
    return FileResponse(path, filename=path.name, media_type="application/octet-stream", headers=headers)


def _view(jobs: JobRepository, row: JobRow) -> JobView:
    return JobView.of(row, jobs.profile_ids([row.id]).get(row.id))
