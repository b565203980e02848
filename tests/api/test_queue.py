"""Whose turn it is, by priority and age; what fits beside what runs; and what is never started."""

import time
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import insert, select, update

from chunkplan.service.db.tables import JobRow
from chunkplan.service.execution.executors.process_identity import ProcessIdentity
from chunkplan.service.execution.ledger import Ledger
from chunkplan.service.job_states import JobState
from chunkplan.service.kit.ids import new_id
from chunkplan.service.machines.devices import Device
from chunkplan.service.operation.retention import Retention
from chunkplan.service.services import build_services
from tests.support.requests import job_request


@pytest.fixture
def ledger(services, settings, clock):
    return Ledger(services.database, settings, clock, services.supervisor.owner)


@pytest.fixture
def device(services):
    return services.supervisor.devices[-1]


def submit(client, clock, dataset, **changes):
    clock.advance(seconds=1)
    return client.post("/v1/jobs", json=job_request(dataset) | changes).json()["id"]


@pytest.fixture
def shared(services):
    """Devices for many jobs; sizes are in plans of a job like all others here."""
    processor = services.supervisor.devices[-1]
    bound = services.supervisor.devices[-1].memory_bytes

    def shared(*sizes, upper_bytes, max_jobs=10):
        assert sum(sizes) * upper_bytes < bound
        return [
            replace(processor, name=f"cpu:{i}", limit_bytes=int(size * upper_bytes), max_jobs=max_jobs)
            for i, size in enumerate(sizes)
        ]

    return shared


@pytest.fixture
def upper_bytes(client, dataset, clock):
    """Bound of every job here."""
    plan_id = client.post("/v1/jobs?dry_run=true", json=job_request(dataset)).json()["plan_id"]
    return client.get(f"/v1/plans/{plan_id}").json()["peak"]["upper_bytes"]


def grow(services, job_id, upper_bytes):
    """Makes a job larger than its plan is."""
    with services.database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(upper_bytes=int(upper_bytes)))


def test_priority_comes_first_then_age(client, clock, dataset, ledger, device):
    device = replace(device, max_jobs=4)
    low = submit(client, clock, dataset, priority=-1)
    old = submit(client, clock, dataset)
    young = submit(client, clock, dataset)
    high = submit(client, clock, dataset, priority=5)
    order = [ledger.claim(device).handle.job_id for _ in range(4)]
    assert order == [high, old, young, low]
    assert ledger.claim(device) is None


def test_waiting_counts_as_priority(client, clock, settings, dataset, ledger, device):
    old = submit(client, clock, dataset)
    clock.advance(seconds=3 * settings.priority_point_seconds)
    still_before = submit(client, clock, dataset, priority=4)
    too_late = submit(client, clock, dataset, priority=2)
    device = replace(device, max_jobs=3)
    queue = client.get("/v1/dashboard/summary").json()["queue"]
    order = [ledger.claim(device).handle.job_id for _ in range(3)]
    assert order == [still_before, old, too_late] == [job["id"] for job in queue]


def test_another_worth_of_priority_orders_the_queue_anew(client, clock, settings, services, dataset, device):
    old = submit(client, clock, dataset)
    clock.advance(seconds=600)
    urgent = submit(client, clock, dataset, priority=2)
    aging = Ledger(
        services.database,
        settings.model_copy(update={"priority_point_seconds": 10.0}),
        clock,
        services.supervisor.owner,
    )
    aging.order_queue()
    device = replace(device, max_jobs=2)
    assert [aging.claim(device).handle.job_id for _ in range(2)] == [old, urgent]


def test_a_device_takes_one_job_unless_more_are_allowed(client, clock, dataset, ledger, device):
    first, second, third = (submit(client, clock, dataset) for _ in range(3))
    assert ledger.claim(device).handle.job_id == first
    assert ledger.claim(device) is None
    roomy = replace(device, max_jobs=2)
    assert ledger.claim(roomy).handle.job_id == second
    assert ledger.claim(roomy) is None
    assert third in {job["id"] for job in client.get("/v1/jobs?state=queued").json()["data"]}


def test_jobs_share_a_device_while_their_bounds_fit(client, clock, dataset, ledger, shared, upper_bytes):
    (device,) = shared(2.5, upper_bytes=upper_bytes)
    jobs = [submit(client, clock, dataset) for _ in range(3)]
    handles = [ledger.claim(device).handle for _ in range(2)]
    assert [handle.job_id for handle in handles] == jobs[:2]
    assert ledger.claim(device) is None
    ledger.finish(handles[0], None)
    assert ledger.claim(device).handle.job_id in {jobs[0], jobs[2]}


def test_two_servers_of_one_host_never_take_too_much(client, clock, settings, services, dataset, shared, upper_bytes):
    """Every supervisor counts what the other ones have started; one of another host does not."""
    (device,) = shared(2.5, upper_bytes=upper_bytes)
    for _ in range(4):
        submit(client, clock, dataset)
    mine = ProcessIdentity.current()
    owners = [mine, replace(mine, pid=mine.pid + 1), replace(mine, host="another-host")]
    ledgers = [Ledger(services.database, settings, clock, str(owner)) for owner in owners]
    assert [ledger.claim(device) is None for ledger in (*ledgers[:2], *ledgers)] == [False, False, True, True, False]


def test_a_large_job_is_not_passed_for_ever(client, clock, services, dataset, ledger, shared, upper_bytes):
    (device,) = shared(2.5, upper_bytes=upper_bytes)
    small = submit(client, clock, dataset)
    running = ledger.claim(device).handle
    assert running.job_id == small
    large, later = submit(client, clock, dataset), submit(client, clock, dataset)
    grow(services, large, 2 * upper_bytes)
    assert ledger.claim(device) is None, "there is room for the later one, but it is kept"
    ledger.finish(running, 0)
    assert ledger.claim(device).handle.job_id == large
    assert later in {job["id"] for job in client.get("/v1/jobs?state=queued").json()["data"]}


def test_room_for_a_large_job_is_kept_on_one_device_only(client, clock, services, dataset, ledger, shared, upper_bytes):
    devices = first, second = shared(2.6, 2.5, upper_bytes=upper_bytes)
    running = [submit(client, clock, dataset) for _ in range(2)]
    handles = [ledger.claim(device, devices).handle for device in devices]
    assert [handle.job_id for handle in handles] == running
    large, later, last = (submit(client, clock, dataset) for _ in range(3))
    grow(services, large, 2.2 * upper_bytes)
    assert ledger.claim(first, devices) is None
    assert ledger.claim(second, devices).handle.job_id == later
    ledger.finish(handles[0], 0)
    assert ledger.claim(first, devices).handle.job_id == large
    grow(services, last, 2.55 * upper_bytes)
    assert ledger.claim(second, devices) is None, "what the other device alone can hold is not rejected"
    grow(services, last, 2.7 * upper_bytes)
    ledger.claim(second, devices)
    assert client.get(f"/v1/jobs/{last}").json()["state"] == "rejected"


def test_a_job_runs_on_the_device_that_it_asks_for(client, clock, services, dataset, ledger, device):
    """Any of its kind, or the one that it names."""
    one, other = (replace(device, name=f"cpu:{i}") for i in range(2))
    named, any_of_them = submit(client, clock, dataset), submit(client, clock, dataset)
    with services.database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == named).values(device="cpu:1"))
    assert ledger.claim(one, [one, other]).handle.job_id == any_of_them
    claimed = ledger.claim(other, [one, other])
    assert (claimed.handle.job_id, claimed.run_spec["device"]) == (named, "cpu")


def test_ten_thousand_queued_jobs_do_not_slow_a_claim(client, clock, services, dataset, ledger, shared, upper_bytes):
    (device,) = shared(2.5, upper_bytes=upper_bytes)
    first = submit(client, clock, dataset)
    with services.database.write() as session:
        columns = JobRow.__table__.columns
        row = session.execute(select(*columns).where(columns.id == first)).mappings().one()
        times = [clock.now() + timedelta(seconds=i) for i in range(1, 10_001)]
        like = dict(row) | {"upper_bytes": 2 * upper_bytes, "request": {}}
        rows = [like | {"id": new_id("job", at), "turn_at": at} for at in times]
        session.execute(insert(JobRow), rows)
    services.database.refresh_statistics()
    assert ledger.claim(device).handle.job_id == first
    started = time.perf_counter()
    roomier = replace(device, name="cpu:1")
    assert ledger.claim(device, [device, roomier]) is None, "not one of them all fits beside what runs"
    assert ledger.claim(roomier, [device, roomier]) is not None
    assert time.perf_counter() - started < 0.5


def test_a_job_that_outgrows_the_device_is_rejected(client, clock, dataset, ledger, device):
    job_id = submit(client, clock, dataset)
    small = Device(device.name, device.gpu.model_copy(update={"memory_bytes": 2**20}))
    assert ledger.claim(small) is None
    job = client.get(f"/v1/jobs/{job_id}").json()
    assert (job["state"], job["reason"]) == ("rejected", "does_not_fit")
    assert "bytes" in job["detail"]


def test_a_busy_device_delays_the_next_try(client, clock, settings, dataset, ledger, device):
    submit(client, clock, dataset)
    handle = ledger.claim(device).handle
    assert ledger.finish(handle, 76).outcome.state is JobState.QUEUED
    assert ledger.claim(device) is None
    clock.advance(seconds=settings.retry_delay_seconds)
    assert ledger.claim(device).handle.number == 2


def test_a_paused_job_is_not_started(client, clock, dataset, ledger, device):
    job_id = submit(client, clock, dataset)
    client.post(f"/v1/jobs/{job_id}/pause")
    assert ledger.claim(device) is None
    client.post(f"/v1/jobs/{job_id}/resume")
    assert ledger.claim(device).handle.job_id == job_id


def test_a_key_is_forgotten_after_its_retention(client, clock, settings, services, dataset):
    headers = {"Idempotency-Key": "old"}
    first = client.post("/v1/jobs", json=job_request(dataset), headers=headers).json()["id"]
    clock.advance(hours=settings.idempotency_retention_hours, seconds=1)
    assert Retention(services.database, settings, clock).prune()["idempotency_keys"] == 1
    assert client.post("/v1/jobs", json=job_request(dataset), headers=headers).json()["id"] != first


def test_a_clock_that_is_set_back_delays_nobody(client, clock, settings, dataset, ledger, device):
    clock.jump(hours=5)
    submit(client, clock, dataset)
    handle = ledger.claim(device).handle
    ledger.finish(handle, 76)
    assert ledger.claim(device) is None
    clock.jump(hours=-5)
    assert ledger.claim(device).handle.job_id == handle.job_id


def test_nothing_is_started_on_a_full_disk(client, clock, settings, services, dataset):
    job_id = submit(client, clock, dataset)
    full = build_services(settings.model_copy(update={"min_free_bytes": 2**60}), services.planner, clock)
    full.supervisor.tick()
    full.database.dispose()
    job = client.get(f"/v1/jobs/{job_id}").json()
    assert (job["state"], job["num_attempts"]) == ("queued", 0)
