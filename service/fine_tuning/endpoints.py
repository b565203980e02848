"""Routes of OpenAI's fine-tuning API: every one is a route of jobs in other words."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Header, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import TypeAdapter, ValidationError
from sqlalchemy.orm import Session

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import MetadataKey, MetadataValue
from chunkplan.service.db.tables import JobRow
from chunkplan.service.fine_tuning.requests import FineTuningRequest, in_their_words, job_request
from chunkplan.service.fine_tuning.schemas import FineTuningCheckpointView, FineTuningEventView, FineTuningJobView
from chunkplan.service.http.dependencies import (
    CallerDep,
    PlanTurn,
    ReadSession,
    ServerDep,
    ServerParts,
    StreamTurn,
    WriteSession,
)
from chunkplan.service.http.examples import FINE_TUNING
from chunkplan.service.job_states import JobState
from chunkplan.service.jobs.endpoints import JobsDep
from chunkplan.service.jobs.idempotency import HEADER
from chunkplan.service.jobs.repository import JobRepository
from chunkplan.service.jobs.stream import FeedDep, LastEvent, StreamedJob
from chunkplan.service.kit.paging import LongWindowDep, Page, WindowDep

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning (OpenAI)"])


@router.post("", status_code=201, dependencies=[PlanTurn])
def create_job(
    request: Annotated[FineTuningRequest, Body(examples=[FINE_TUNING])],
    response: Response,
    jobs: JobsDep,
    caller: CallerDep,
    server: ServerDep,
    idempotency_key: Annotated[str | None, Header(alias=HEADER)] = None,
) -> FineTuningJobView:
    """Submit a job. It is checked, planned and admitted first, as at ``POST /v1/jobs``."""
    with in_their_words():
        answer = jobs.submit(caller.project, job_request(request), idempotency_key)
    if answer.replayed:
        response.headers["Idempotency-Replayed"] = "true"
    job_id = answer.body["id"]
    response.headers["Location"] = f"/v1/fine_tuning/jobs/{job_id}"
    with server.database.of(caller.project).read() as session:
        return _view(server, session, JobRepository(session).get(job_id))


_FILTER = re.compile(r"metadata\[(.*)\]", re.DOTALL)
_METADATA: TypeAdapter[dict[str, str]] = TypeAdapter(dict[MetadataKey, MetadataValue])
_METADATA_PARAMETER = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "explode": True,
    "description": "only jobs that hold these pairs: `metadata[key]=value`",
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
}


async def _metadata(request: Request) -> dict[str, str]:
    given = {key: value for key, value in request.query_params.items() if key.startswith("metadata")}
    try:
        return _METADATA.validate_python({_FILTER.fullmatch(key)[1]: value for key, value in given.items()})  # type: ignore[index]
    except (TypeError, ValidationError) as error:
        raise InputError("metadata", "should be given as metadata[key]=value, of a key that a job can have") from error


@router.get("", openapi_extra={"parameters": [_METADATA_PARAMETER]})
def list_jobs(
    session: ReadSession,
    server: ServerDep,
    window: WindowDep,
    metadata: Annotated[dict[str, str], Depends(_metadata)],
) -> Page[FineTuningJobView]:
    """Jobs, newest first, whichever way they were submitted."""
    rows, has_more = JobRepository(session).page(window, metadata=metadata)
    return Page.of(_views(server, session, rows), has_more=has_more)


@router.get("/{job_id}")
def retrieve_job(job_id: str, session: ReadSession, server: ServerDep) -> FineTuningJobView:
    """One job."""
    return _view(server, session, JobRepository(session).get(job_id))


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, session: WriteSession, jobs: JobsDep, server: ServerDep) -> FineTuningJobView:
    """Cancel; safe to repeat. A running job is ``running`` until it has stopped."""
    return _view(server, session, jobs.cancel(session, job_id))


@router.post("/{job_id}/pause")
def pause_job(job_id: str, session: WriteSession, jobs: JobsDep, server: ServerDep) -> FineTuningJobView:
    """Pause at a checkpoint; safe to repeat. A running job is ``running`` until it has stopped."""
    return _view(server, session, jobs.pause(session, job_id))


@router.post("/{job_id}/resume")
def resume_job(job_id: str, session: WriteSession, jobs: JobsDep, server: ServerDep) -> FineTuningJobView:
    """Queue a paused job again; safe to repeat."""
    return _view(server, session, jobs.resume(session, job_id))


@router.get("/{job_id}/events")
def list_events(job_id: str, session: ReadSession, window: LongWindowDep) -> Page[FineTuningEventView]:
    """What happened, newest first."""
    jobs = JobRepository(session)
    rows, has_more = jobs.events(jobs.get(job_id).id, window, newest_first=True)
    return Page.of([FineTuningEventView.of(row) for row in rows], has_more=has_more)


@router.get("/{job_id}/events/stream", response_class=EventSourceResponse, dependencies=[StreamTurn])
async def stream_events(
    job: StreamedJob, last_event: LastEvent, feed: FeedDep, caller: CallerDep
) -> AsyncIterator[ServerSentEvent]:
    """Events in their order as they happen, until the job has ended; ``Last-Event-ID`` resumes after one's
    ``id``.
    """
    async for row in feed.events(caller, job, last_event):
        # The stream's own ids are left out: after one, OpenAI's client takes the comments in between for
        # events.
        yield ServerSentEvent(raw_data=FineTuningEventView.of(row).model_dump_json())


@router.get("/{job_id}/checkpoints")
def list_checkpoints(job_id: str, session: ReadSession, window: WindowDep) -> Page[FineTuningCheckpointView]:
    """Checkpoints, newest first."""
    jobs = JobRepository(session)
    job = jobs.get(job_id)
    rows, has_more = jobs.checkpoints(job.id, window)
    train, evaluation = (jobs.losses_at(job.id, kind, [row.step for row in rows]) for kind in ("train", "eval"))
    views = [
        FineTuningCheckpointView.of(row, job.run_spec["output_name"], train.get(row.step), evaluation.get(row.step))
        for row in rows
    ]
    return Page.of(views, has_more=has_more)


def _view(server: ServerParts, session: Session, row: JobRow) -> FineTuningJobView:
    has_succeeded = row.state is JobState.SUCCEEDED
    tokens = JobRepository(session).trained_tokens(row.id) if has_succeeded else None
    return _views(server, session, [row])[0].model_copy(update={"trained_tokens": tokens})


def _views(server: ServerParts, session: Session, rows: Sequence[JobRow]) -> list[FineTuningJobView]:
    """As they are listed: without the tokens, which take a sum over every step."""
    profiles = JobRepository(session).profile_ids([row.id for row in rows])
    runs_dir, now = server.settings.runs_dir, server.clock.now()
    return [FineTuningJobView.of(row, profile_id=profiles.get(row.id), runs_dir=runs_dir, now=now) for row in rows]
