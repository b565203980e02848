"""Leases: who cannot renew one stops its trainer, and who hangs loses its attempts to another server."""

import psycopg
import pytest

from tests.support.live import ENDLESS, gone
from tests.support.requests import job_request
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("database_url", ["postgres"], indirect=True)]

SHORT = {"lease_seconds": 3, "database_timeout_seconds": 1, "retry_delay_seconds": 0.1}


def submit(server, dataset):
    return server.post("/v1/jobs", job_request(dataset, max_steps=ENDLESS, checkpoint_every=5))["id"]


def suspend_while_it_writes(server, database_url):
    """Suspends the only server on a database in the middle of a unit of work that has written and holds
    locks."""
    writing = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND backend_xid IS NOT NULL"
    with psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True) as connection:

        def catch():
            server.suspend()
            if connection.execute(f"{writing} AND state = 'idle in transaction'").fetchone():
                return True
            server.wake()
            return False

        wait_for(catch, "a moment at which the server writes", 60, every=0.003)


def test_a_server_that_cannot_renew_its_lease_ends_its_trainer(start_server, dataset, database_url):
    server = start_server(**SHORT)
    job_id = submit(server, dataset)
    server.wait_for_events(job_id, "checkpoint", 1)
    (trainer,) = server.trainers()
    with psycopg.connect(database_url.replace("+psycopg", "")) as connection:
        connection.execute("LOCK TABLE attempts IN ACCESS EXCLUSIVE MODE")
        wait_for(lambda: gone(trainer), "the trainer to end", 30)
    started = server.wait_for_events(job_id, "started", 2)
    assert started[1]["data"]["resumed_step"] >= 5
    server.post(f"/v1/jobs/{job_id}/cancel")


def test_a_hanging_server_loses_its_attempt_its_locks_and_its_voice(start_server, dataset, database_url):
    hanging = start_server(**SHORT)
    job_id = submit(hanging, dataset)
    hanging.wait_for_events(job_id, "checkpoint", 1)
    (trainer,) = hanging.trainers()
    suspend_while_it_writes(hanging, database_url)
    try:
        other = start_server(**SHORT)
        wait_for(lambda: gone(trainer), "the trainer to be told to stop", 60)
        (second,) = other.wait_for_events(job_id, "started", 2)[1:]
        first = other.get(f"/v1/jobs/{job_id}/attempts")["data"][-1]
        assert first["reason"] == "server_lost"
        assert second["data"]["resumed_step"] == first["checkpoint_step"] == first["last_step"]
    finally:
        hanging.wake()
    (replacement,) = other.trainers()
    assert hanging.get(f"/v1/jobs/{job_id}/attempts")["data"][-1] == first, "what has ended stays as it ended"
    assert not gone(replacement)
    other.post(f"/v1/jobs/{job_id}/cancel")
    other.wait_for_state(job_id, "cancelled")
