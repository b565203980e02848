"""Postgres goes away and comes back while a job runs."""

import pytest

from benchmarks.chaos_checks import Asked, find_violations
from tests.support.live import ENDLESS, gone
from tests.support.postgres import PostgresCluster
from tests.support.requests import job_request
from tests.support.waiting import wait_for


@pytest.fixture
def cluster():
    with PostgresCluster() as cluster:
        yield cluster


@pytest.fixture
def database_url(cluster):
    return cluster.url


@pytest.mark.slow
def test_a_job_outlives_its_database(start_server, cluster, dataset, database_url, tmp_path):
    server = start_server(database_timeout_seconds=2)
    job_id = server.post("/v1/jobs", job_request(dataset, max_steps=ENDLESS, checkpoint_every=5))["id"]
    events = tmp_path / "var" / "jobs" / job_id / "attempts" / "1" / "events.jsonl"
    server.wait_for_events(job_id, "checkpoint")
    (trainer,) = server.trainers()

    cluster.stop()
    size = events.stat().st_size
    refused = server.http.get(f"/v1/jobs/{job_id}")
    assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
    assert server.http.get("/readyz").status_code == 503
    wait_for(lambda: events.stat().st_size > size + 5_000, "the trainer to go on")
    reported = events.read_text().count('"type": "step"')
    cluster.start()
    wait_for(server.is_ready, "the server to find its database again")
    steps = server.wait_for_events(job_id, "step", reported + 1)
    assert [event["data"]["step"] for event in steps] == list(range(1, len(steps) + 1))
    assert [attempt["number"] for attempt in server.get(f"/v1/jobs/{job_id}/attempts")["data"]] == [1]

    cluster.stop()
    server.close()  # it ends without its database, and its trainer at a checkpoint
    assert gone(trainer)
    cluster.start()
    restarted = start_server()
    first = restarted.wait_for_attempt_end(job_id)
    assert (first["reason"], first["checkpoint_step"]) == ("server_lost", first["last_step"]), "not a step was lost"
    restarted.post(f"/v1/jobs/{job_id}/cancel")
    restarted.wait_for_state(job_id, "cancelled")
    asked = [Asked(job_id, "cancel", cancelled=True, state="cancelled", seen=None)]
    assert find_violations(database_url, tmp_path / "var", asked, ENDLESS).violations == []
