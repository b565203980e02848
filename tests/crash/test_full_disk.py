"""A disk that is full: for the server's database, for a trainer's checkpoint, for its event file."""

import pytest

from benchmarks.chaos_checks import Asked, find_violations
from tests.support.full_disk import fill_disk_for, full_disk
from tests.support.live import ENDLESS
from tests.support.requests import job_request
from tests.support.waiting import wait_for


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_job_outlives_a_full_disk(start_server, dataset, database_url, tmp_path):
    server = start_server(retry_delay_seconds=0.1)
    request = job_request(dataset, max_steps=ENDLESS, checkpoint_every=5)
    job_id = server.post("/v1/jobs", request)["id"]
    events = [tmp_path / "var" / "jobs" / job_id / "attempts" / str(number) / "events.jsonl" for number in (1, 2, 3)]
    server.wait_for_events(job_id, "checkpoint")

    with full_disk(server.pid):
        refused = server.http.post("/v1/jobs", json=request)
        assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
        size = events[0].stat().st_size
        wait_for(lambda: events[0].stat().st_size > size + 5_000, "the trainer to go on")
        stored = server.get(f"/v1/jobs/{job_id}/attempts")["data"][0]["last_step"]
    assert [job["id"] for job in server.get("/v1/jobs")["data"]] == [job_id], "what was refused is not there"
    wait_for(lambda: server.get(f"/v1/jobs/{job_id}/attempts")["data"][0]["last_step"] > stored, "its steps")

    (trainer,) = server.trainers()
    fill_disk_for(trainer.pid, 300_000)  # its checkpoints have larger files
    server.wait_for_events(job_id, "started", 2)
    (failed,) = server.wait_for_events(job_id, "failed")
    assert "File too large" in failed["data"]["detail"]

    (trainer,) = wait_for(server.trainers, "the second trainer")
    fill_disk_for(trainer.pid, events[1].stat().st_size)  # not a line more, not even of its failure
    wait_for(lambda: server.get(f"/v1/jobs/{job_id}/attempts")["data"][-2]["ended_at"], "the second attempt to end")
    server.post(f"/v1/jobs/{job_id}/cancel")
    server.wait_for_state(job_id, "cancelled")

    *_, second, first = server.get(f"/v1/jobs/{job_id}/attempts")["data"]
    assert (first["reason"], second["reason"]) == ("error", "process_lost")
    assert second["resumed_step"] == first["checkpoint_step"] > 0
    asked = [Asked(job_id, "cancel", cancelled=True, state="cancelled", seen=None)]
    assert find_violations(database_url, tmp_path / "var", asked, ENDLESS).violations == []
