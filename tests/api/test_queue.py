"""Whose turn it is: priority, then age; and what is never started."""

import pytest

from service.execution.devices import Device
from service.execution.ledger import Ledger
from service.jobs.states import JobState
from service.operation.retention import Retention
from tests.api.requests import job_request


@pytest.fixture
def ledger(services, settings, clock):
    return Ledger(services.database, settings, clock, services.supervisor.owner)


@pytest.fixture
def device(services):
    return services.supervisor.devices[-1]


def submit(client, clock, dataset, **changes):
    clock.advance(seconds=1)
    return client.post("/v1/jobs", json=job_request(dataset) | changes).json()["id"]


def test_priority_comes_first_then_age(client, clock, dataset, ledger, device):
    low = submit(client, clock, dataset, priority=-1)
    old = submit(client, clock, dataset)
    young = submit(client, clock, dataset)
    high = submit(client, clock, dataset, priority=5)
    order = [ledger.claim(device).handle.job_id for _ in range(4)]
    assert order == [high, old, young, low]
    assert ledger.claim(device) is None


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
