"""Server-Sent Events: the rows of ``/events`` as they come, until the job has ended."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

import anyio
from anyio import to_thread
from fastapi import APIRouter, Depends, Header
from fastapi.sse import EventSourceResponse, ServerSentEvent

from engine.errors import InputError
from service.access.keys import Caller
from service.db.tables import EventRow
from service.dependencies import CallerDep, ReadSession, ServicesDep, StreamTurn
from service.jobs.repository import JobRepository
from service.jobs.schemas import EventView
from service.paging import Window
from service.services import Services

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

_BATCH = 500


def _existing_job(job_id: str, session: ReadSession) -> str:
    return JobRepository(session).get(job_id).id


def _last_event(last_event_id: Annotated[str | None, Header()] = None) -> int:
    try:
        return Window(last_event_id, _BATCH).number()
    except InputError as error:
        raise InputError("Last-Event-ID", "should be the id of an event of this job") from error


StreamedJob = Annotated[str, Depends(_existing_job, scope="function")]
LastEvent = Annotated[int, Depends(_last_event)]


@router.get("/{job_id}/events/stream", response_class=EventSourceResponse, dependencies=[StreamTurn])
async def stream_events(
    job: StreamedJob,
    last_event: LastEvent,
    services: ServicesDep,
    caller: CallerDep,
) -> AsyncIterator[ServerSentEvent]:
    """Events as they happen; ``Last-Event-ID`` resumes after an event. The stream ends when the job has ended, or the
    key does.
    """
    async for row in events_as_they_come(services, caller, job, last_event):
        event = EventView.of(row)
        yield ServerSentEvent(raw_data=event.model_dump_json(), event=event.type, id=event.id)


async def events_as_they_come(
    services: Services, caller: Caller, job_id: str, last_event: int
) -> AsyncIterator[EventRow]:
    """A job's events after one, until the job has ended, the caller's key has, or the server is about to stop."""
    while not services.closing.is_set():
        events, is_final = await to_thread.run_sync(_next_events, services, caller, job_id, last_event)
        for event in events:
            yield event
            last_event = event.number
        if is_final and len(events) < _BATCH:
            return
        if len(events) < _BATCH:
            await anyio.sleep(services.settings.poll_seconds)


def _next_events(services: Services, caller: Caller, job_id: str, last_event: int) -> tuple[list[EventRow], bool]:
    """Events after one, and whether they are the last: the job had ended before, or the caller may not go on."""
    if not services.access.is_still_valid(caller):
        return [], True
    with services.database.of(caller.project).read() as session:
        jobs = JobRepository(session)
        is_final = jobs.get(job_id).state.is_final
        rows, _ = jobs.events(job_id, Window(str(last_event), _BATCH))
        return rows, is_final
