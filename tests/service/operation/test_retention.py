"""What is past its retention goes, in small pieces, and nothing else does."""

import threading

import pytest
from sqlalchemy import func, select

from chunkplan.service.db import Database
from chunkplan.service.db.tables import EventRow, MetricRow, SampleRow
from chunkplan.service.execution.ledger import Ledger
from chunkplan.service.operation.retention import Retention
from tests.support.requests import job_request
from tests.support.run import STARTED, Reports, step
from tests.support.waiting import wait_for


@pytest.fixture
def small_batches(settings):
    return settings.model_copy(update={"prune_batch_rows": 3})


@pytest.fixture
def retention(services, small_batches, clock):
    return Retention(services.database, small_batches, clock)


@pytest.fixture
def handle(client, dataset, services, settings, clock):
    client.post("/v1/jobs", json=job_request(dataset))
    return (
        Ledger(services.database, settings, clock, services.supervisor.owner)
        .claim(services.supervisor.devices[-1])
        .handle
    )


@pytest.fixture
def reports(services, settings, clock, tmp_path):
    return Reports(Ledger(services.database, settings, clock, services.supervisor.owner), tmp_path)


def count(services, table, *where):
    with services.database.read() as session:
        return session.scalar(select(func.count()).select_from(table).where(*where))


def is_step(table=EventRow):
    return table.type == "step"


def test_raw_rows_go_and_what_was_added_up_stays(client, services, settings, clock, retention, handle, reports):
    reports.complete(handle, *[step(number) for number in range(1, 11)])
    before = client.get("/v1/dashboard/usage", params={"days": 366}).json()
    assert retention.prune() == {"samples": 0, "step_events": 0, "idempotency_keys": 0}
    clock.advance(days=settings.samples_retention_days + 1)
    batches = []
    deleted = retention.prune(on_batch=lambda name, count: batches.append((name, count)))
    assert deleted == {"samples": 10, "step_events": 10, "idempotency_keys": 0}
    assert [count for name, count in batches if name == "samples"] == [3, 3, 3, 1]
    assert (count(services, SampleRow), count(services, EventRow, is_step())) == (0, 0)
    assert count(services, EventRow) > 0, "what happened to the job stays"
    metrics = client.get(f"/v1/jobs/{handle.job_id}/metrics").json()["data"]
    assert [metric["allocated_bytes"] for metric in metrics] == [10] * 10
    assert client.get("/v1/dashboard/usage", params={"days": 366}).json() == before
    assert client.get("/v1/dashboard/accuracy").json()["data"][0]["num_profiles"] == 1
    assert retention.prune() == {"samples": 0, "step_events": 0, "idempotency_keys": 0}


def test_samples_of_a_job_wait_for_its_profile(services, settings, clock, retention, handle, reports):
    reports.write(handle, STARTED, *[step(number) for number in range(1, 6)])
    clock.advance(days=settings.samples_retention_days + 1)
    assert retention.prune()["samples"] == 0
    reports.complete(handle, step(6))
    assert retention.prune()["samples"] == 6
    assert count(services, MetricRow) == 6


def test_pruning_stops_between_batches_and_goes_on_later(settings, clock, retention, handle, reports):
    reports.complete(handle, *[step(number) for number in range(1, 11)])
    clock.advance(days=settings.samples_retention_days + 1)
    stop = threading.Event()
    deleted = retention.prune(stop, lambda _name, _count: stop.set())
    assert deleted == {"samples": 3, "step_events": 0, "idempotency_keys": 0}
    assert retention.prune()["samples"] == 7


def test_two_servers_delete_every_row_once(services, small_batches, settings, clock, retention, handle, reports):
    reports.complete(handle, *[step(number) for number in range(1, 41)])
    clock.advance(days=settings.samples_retention_days + 1)
    other = Database(settings.database_url)
    barrier = threading.Barrier(2)
    found = []

    def prune(database):
        barrier.wait()
        found.append(Retention(database, small_batches, clock).prune())

    threads = [threading.Thread(target=prune, args=[database]) for database in (services.database, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.dispose()
    left = retention.prune()
    assert sum(deleted["samples"] for deleted in found) + left["samples"] == 40
    assert sum(deleted["step_events"] for deleted in found) + left["step_events"] == 40
    assert (count(services, SampleRow), count(services, EventRow, is_step())) == (0, 0)


def test_the_service_prunes_by_itself(client, services, settings, clock, handle, reports):
    reports.complete(handle, *[step(number) for number in range(1, 6)])
    clock.advance(days=settings.samples_retention_days + 1)
    value = services.metrics.registry.get_sample_value
    with client:
        wait_for(lambda: value("chunkplan_pruned_rows_total", {"of": "step_events"}), "step events to be pruned")
    assert value("chunkplan_pruned_rows_total", {"of": "samples"}) == 5
    assert count(services, SampleRow) == 0
