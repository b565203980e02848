"""Server-Sent Events: the rows of ``/events`` as they come, until the job has ended."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header
from fastapi.sse import EventSourceResponse, ServerSentEvent

from chunkplan.engine.errors import InputError
from chunkplan.service.http.dependencies import CallerDep, ReadSession, StreamTurn, part
from chunkplan.service.jobs.feed import EventFeed
from chunkplan.service.jobs.repository import JobRepository
from chunkplan.service.jobs.schemas import EventView
from chunkplan.service.kit.paging import Window

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


def _existing_job(job_id: str, session: ReadSession) -> str:
    return JobRepository(session).get(job_id).id


def _last_event(last_event_id: Annotated[str | None, Header()] = None) -> int:
    try:
        return Window(last_event_id, 1).number()
    except InputError as error:
        raise InputError("Last-Event-ID", "should be the id of an event of this job") from error


StreamedJob = Annotated[str, Depends(_existing_job, scope="function")]
FeedDep = Annotated[EventFeed, part("feed")]
LastEvent = Annotated[int, Depends(_last_event)]


@router.get("/{job_id}/events/stream", response_class=EventSourceResponse, dependencies=[StreamTurn])
async def stream_events(
    job: StreamedJob,
    last_event: LastEvent,
    feed: FeedDep,
    caller: CallerDep,
) -> AsyncIterator[ServerSentEvent]:
    """Events as they happen; ``Last-Event-ID`` resumes after an event. The stream ends when the job has
    ended, or the key does.
    """
    async for row in feed.events(caller, job, last_event):
        event = EventView.of(row)
        yield ServerSentEvent(raw_data=event.model_dump_json(), event=event.type, id=event.id)
