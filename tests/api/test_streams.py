"""Event streams of one server: they share what they read, and each shows every event once and in order."""

import anyio
from anyio import to_thread
from sqlalchemy import event

from chunkplan.service.access.keys import ANYBODY
from chunkplan.service.jobs.repository import JobRepository
from chunkplan.service.jobs.transitions import add_event
from tests.support.requests import job_request


def submit(client, dataset):
    return client.post("/v1/jobs", json=job_request(dataset)).json()["id"]


def write_events(services, clock, job_id, count):
    with services.database.write() as session:
        job = JobRepository(session).lock(job_id)
        for _ in range(count):
            add_event(session, job, "note", {}, now=clock.now())


def follow(services, clock, job_ids, starts, num_rounds=6):
    """The ids that streams from these places saw of each job, while events were written and then the jobs
    cancelled."""
    seen = {(job_id, number): [] for job_id in job_ids for number in range(len(starts))}

    async def stream(job_id, number):
        async for row in services.feed.events(ANYBODY, job_id, starts[number]):
            seen[job_id, number].append(row.number)

    async def work():
        async with anyio.create_task_group() as group:
            for job_id, number in seen:
                group.start_soon(stream, job_id, number)
            for _ in range(num_rounds):
                for job_id in job_ids:
                    await to_thread.run_sync(write_events, services, clock, job_id, 5)
            for job_id in job_ids:
                with services.database.write() as session:
                    services.jobs.cancel(session, job_id)

    anyio.run(work)
    return seen


def test_every_stream_shows_every_event_once_and_in_order(client, services, clock, dataset):
    first, second = (submit(client, dataset) for _ in range(2))
    write_events(services, clock, first, 1200)  # more than are read at once
    seen = follow(services, clock, [first, second], starts=[0, 0, 7, 10**9])
    for job_id, count in ((first, 1200), (second, 0)):
        everything = list(range(1, 1 + count + 30 + 1 + 1))  # queued, those written, cancelled
        assert [seen[job_id, number] for number in range(4)] == [everything, everything, everything[7:], []]


def test_many_streams_ask_the_database_no_more_than_a_few(client, services, clock, dataset):
    statements = []
    event.listen(services.database.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))

    def cost(num_streams):
        job_id = submit(client, dataset)
        del statements[:]
        follow(services, clock, [job_id], [0] * num_streams)
        return sum("events" in text and text.startswith("SELECT") for text in statements)

    assert cost(60) < 3 * cost(6)
