"""Clocks that are set while jobs run: by hours, forwards and back, on one of two servers."""

from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from tests.support.live import ENDLESS, gone
from tests.support.requests import job_request
from tests.support.waiting import wait_for

JUMPING = "tests.support.jumping_server"
SETTINGS = {"lease_seconds": 8, "database_timeout_seconds": 2, "stop_grace_seconds": 2, "retry_delay_seconds": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_leases_and_grace_outlive_clocks_that_are_set(start_server, dataset, database_url, tmp_path, monkeypatch):
    offset = tmp_path / "offset"
    offset.write_text("0")
    monkeypatch.setenv("CLOCK_OFFSET_FILE", str(offset))
    jumping = start_server(JUMPING, **SETTINGS)
    job_id = jumping.post("/v1/jobs", job_request(dataset, max_steps=ENDLESS, checkpoint_every=5))["id"]
    jumping.wait_for_events(job_id, "checkpoint")
    (trainer,) = jumping.trainers()
    other = start_server(**SETTINGS)

    with psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True) as connection:

        def lease():
            return connection.execute("SELECT lease_expires_at FROM attempts WHERE ended_at IS NULL").fetchone()[0]

        def jump(hours, renewals):
            """Sets the clock; returns when its server has renewed its lease by it, every third of a lease's
            time."""
            offset.write_text(str(hours * 3600))
            for _ in range(renewals):
                last = lease()
                wait_for(lambda last=last: lease() != last, "the lease to be renewed")
            assert abs(lease() - datetime.now(UTC) - timedelta(hours=hours)) < timedelta(minutes=1)

        jump(5, renewals=2)
        jump(-5, renewals=5)  # the other server sees a lease that ran out five hours ago, and that is renewed
        assert not gone(trainer)
        assert [attempt["ended_at"] for attempt in other.get(f"/v1/jobs/{job_id}/attempts")["data"]] == [None]
        jump(5, renewals=2)  # now it has five hours to go, and nobody will renew it
    jumping.suspend()
    try:
        other.wait_for_events(job_id, "started", 2)
        assert gone(trainer)
    finally:
        jumping.wake()
    second, first = other.get(f"/v1/jobs/{job_id}/attempts")["data"]
    assert (first["reason"], second["resumed_step"]) == ("server_lost", first["checkpoint_step"])

    (trainer,) = other.trainers()
    trainer.suspend()  # it hangs
    other.post(f"/v1/jobs/{job_id}/cancel")
    offset.write_text("-18000")
    other.wait_for_state(job_id, "cancelled", seconds=30)
    assert gone(trainer)
    numbers = [int(event["id"]) for event in other.events(job_id)]
    assert numbers == list(range(1, len(numbers) + 1))
