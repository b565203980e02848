"""From a trainer's event file to rows: exactly once, and only with the attempt's own token."""

import json
from dataclasses import replace

import pytest
from sqlalchemy import select

from chunkplan.service.db.tables import AttemptRow, CheckpointRow, EventRow, JobRow, MetricRow, SampleRow
from chunkplan.service.execution.ledger import Ledger, StaleToken
from chunkplan.service.execution.records.messages import read_messages
from chunkplan.service.job_states import JobState
from tests.support.requests import job_request
from tests.support.run import STARTED, TIME, step

CHECKPOINT = {
    "type": "checkpoint",
    "time": TIME,
    "step": 1,
    "path": "checkpoints/x",
    "size_bytes": 1,
    "sha256": "0" * 64,
}


@pytest.fixture
def event_file(tmp_path):
    path = tmp_path / "events.jsonl"

    def write(*lines, end="\n"):
        with path.open("a") as file:
            file.write("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + end)
        return path

    return write


@pytest.fixture
def ledger(services, settings, clock):
    return Ledger(services.database, settings, clock, services.supervisor.owner)


@pytest.fixture
def handle(client, dataset, ledger, services):
    """A job that was just given to the processor."""
    client.post("/v1/jobs", json=job_request(dataset))
    claimed = ledger.claim(services.supervisor.devices[-1])
    assert claimed is not None
    return claimed.handle


def rows(services, table):
    with services.database.read() as session:
        return list(session.scalars(select(table)))


def test_messages_become_rows(services, ledger, handle, event_file):
    evaluation = {"type": "eval", "time": TIME, "step": 0, "loss": 3.0, "perplexity": 20.0, "num_tokens": 10}
    batch = read_messages(event_file(STARTED, evaluation, step(1), CHECKPOINT), 0)
    ledger.ingest(handle, batch, 0)
    (job,) = rows(services, JobRow)
    assert (job.state, job.step, job.total_steps, job.loss) == (JobState.RUNNING, 1, 8, 2.0)
    assert {(metric.kind, metric.step, metric.loss) for metric in rows(services, MetricRow)} == {
        ("eval", 0, 3.0),
        ("train", 1, 2.0),
    }
    (sample,) = rows(services, SampleRow)
    assert (sample.phase, sample.allocated_bytes) == ("forward", 10)
    assert [checkpoint.step for checkpoint in rows(services, CheckpointRow)] == [1]
    events = sorted(rows(services, EventRow), key=lambda event: event.number)
    assert [event.number for event in events] == list(range(1, 8))
    kinds = ["state", "state", "state", "started", "eval", "step", "checkpoint"]
    assert [event.type for event in events] == kinds
    assert "samples" not in events[5].data


def test_a_batch_cannot_be_written_twice(services, ledger, handle, event_file):
    batch = read_messages(event_file(STARTED, step(1)), 0)
    ledger.ingest(handle, batch, 0)
    before = len(rows(services, EventRow))
    with pytest.raises(StaleToken):
        ledger.ingest(handle, batch, 0)
    assert len(rows(services, EventRow)) == before
    assert len(rows(services, MetricRow)) == 1


def test_a_stale_token_changes_nothing(services, ledger, handle, event_file):
    stale = replace(handle, token="0" * 32)
    batch = read_messages(event_file(STARTED), 0)
    for write in (
        lambda: ledger.ingest(stale, batch, 0),
        lambda: ledger.record_process(stale, "host/1/1.0"),
        lambda: ledger.finish(stale, 0),
    ):
        with pytest.raises(StaleToken):
            write()
    (attempt,) = rows(services, AttemptRow)
    assert (attempt.events_offset, attempt.process, attempt.ended_at) == (0, None, None)
    assert [job.state for job in rows(services, JobRow)] == [JobState.STARTING]


def test_an_attempt_that_has_ended_writes_no_more(services, ledger, handle, event_file):
    ledger.finish(handle, None)
    with pytest.raises(StaleToken):
        ledger.ingest(handle, read_messages(event_file(STARTED), 0), 0)
    assert [job.state for job in rows(services, JobRow)] == [JobState.QUEUED]


def test_a_resumed_attempt_supersedes_the_steps_that_it_takes_again(client, services, ledger, handle, event_file):
    ledger.ingest(handle, read_messages(event_file(STARTED, step(1), step(2), step(3)), 0), 0)
    ledger.finish(handle, None)
    second = ledger.claim(services.supervisor.devices[-1]).handle
    path = event_file(STARTED | {"resumed_step": 1}, step(2, loss=1.5))
    first_half = path.read_text().index(json.dumps(STARTED | {"resumed_step": 1}))
    ledger.ingest(second, replace(read_messages(path, first_half), next_offset=1), 0)
    metrics = client.get(f"/v1/jobs/{handle.job_id}/metrics").json()["data"]
    assert [(metric["step"], metric["loss"]) for metric in metrics] == [(1, 2.0), (2, 1.5)]


def test_an_incomplete_last_line_waits_for_its_end(event_file):
    path = event_file(STARTED)
    event_file('{"type": "step", "ti', end="")
    batch = read_messages(path, 0)
    assert [message.type for message in batch.messages] == ["started"]
    assert batch.next_offset == len(json.dumps(STARTED)) + 1
    assert read_messages(path, batch.next_offset).messages == []


def test_lines_that_say_nothing_are_passed_over(event_file):
    path = event_file("not json", "[1]", '{"type": "step"}', step(1, loss="high"), "\ufffd", STARTED)
    assert [message.type for message in read_messages(path, 0).messages] == ["started"]


def test_what_a_database_cannot_hold_is_made_harmless(services, ledger, handle, event_file):
    line = json.dumps(step(1, note="a\x00b\ud800")).replace("2.0", "NaN")
    huge = STARTED | {"total_steps": 10**30}
    ledger.ingest(handle, read_messages(event_file(huge, line), 0), 0)
    (metric,) = rows(services, MetricRow)
    assert metric.loss is None
    assert [job.total_steps for job in rows(services, JobRow)] == [2**63 - 1]


def test_a_long_file_is_read_in_pieces(event_file):
    path = event_file(*[step(number) for number in range(50)])
    offset, numbers = 0, []
    while (batch := read_messages(path, offset, max_bytes=700)).next_offset > offset:
        numbers += [message.step for message in batch.messages]
        offset = batch.next_offset
    assert numbers == list(range(50))


def test_a_missing_file_has_no_messages(tmp_path):
    assert read_messages(tmp_path / "events.jsonl", 0).messages == []
