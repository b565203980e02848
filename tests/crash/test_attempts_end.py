"""Trainers that are stopped, killed, or cannot go on; on one real server."""

import fcntl
import signal

import pytest

from tests.support.live import ENDLESS, gone
from tests.support.requests import job_request
from tests.support.waiting import wait_for

# test_server_killed.py runs on both databases; what is new here does not depend on which one it is.
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("database_url", ["postgres"], indirect=True)]


@pytest.fixture
def server(start_server):
    return start_server(retry_delay_seconds=0.1)


def submit(server, dataset, **training):
    return server.post("/v1/jobs", job_request(dataset, max_steps=ENDLESS, checkpoint_every=5, **training))["id"]


def test_stopping_the_server_checkpoints_and_requeues(start_server, server, dataset):
    job_id = submit(server, dataset)
    server.wait_for_events(job_id, "step", 3)
    (trainer,) = server.trainers()
    with server.http.stream("GET", f"/v1/jobs/{job_id}/events/stream") as stream:
        lines = stream.iter_lines()
        next(lines)
        server.stop()
        assert list(lines), "the stream is brought to its end, not broken off"
    assert gone(trainer)
    restarted = start_server()
    (second, *_) = restarted.wait_for_events(job_id, "started", 2)[1:]
    first = restarted.get(f"/v1/jobs/{job_id}/attempts")["data"][-1]
    assert (first["reason"], first["exit_code"]) == ("server_shutdown", 75)
    assert second["data"]["resumed_step"] == first["last_step"], "not a step was lost"
    restarted.post(f"/v1/jobs/{job_id}/cancel")


def test_a_killed_trainer_is_started_again_from_its_checkpoint(server, dataset):
    job_id = submit(server, dataset)
    server.wait_for_events(job_id, "checkpoint", 1)
    (trainer,) = server.trainers()
    trainer.send_signal(signal.SIGKILL)
    started = server.wait_for_events(job_id, "started", 2)
    assert started[1]["data"]["resumed_step"] >= 5
    first = server.get(f"/v1/jobs/{job_id}/attempts")["data"][-1]
    assert (first["reason"], first["exit_code"]) == ("process_lost", -9)
    server.post(f"/v1/jobs/{job_id}/cancel")
    server.wait_for_state(job_id, "cancelled")


def test_pausing_cancelling_and_what_they_leave(server, dataset, tmp_path):
    job_id = submit(server, dataset)
    server.wait_for_events(job_id, "step", 2)
    assert server.post(f"/v1/jobs/{job_id}/pause")["state"] == "pausing"
    job = server.wait_for_state(job_id, "paused")
    assert server.trainers() == []
    paused_at = job["progress"]["step"]
    server.post(f"/v1/jobs/{job_id}/resume")
    started = server.wait_for_events(job_id, "started", 2)
    assert started[1]["data"]["resumed_step"] == paused_at
    (trainer,) = wait_for(server.trainers, "the trainer")
    assert server.post(f"/v1/jobs/{job_id}/cancel")["state"] == "cancelling"
    server.wait_for_state(job_id, "cancelled")
    assert gone(trainer)
    run_dir = tmp_path / "var" / "jobs" / job_id
    assert list(run_dir.glob("checkpoints/step-*"))
    assert (run_dir / "attempts" / "2" / "log.txt").exists()


def test_a_trainer_that_does_not_stop_is_killed(start_server, dataset):
    server = start_server(stop_grace_seconds=0.5)
    job_id = submit(server, dataset)
    server.wait_for_events(job_id, "step", 1)
    (trainer,) = server.trainers()
    trainer.suspend()
    server.post(f"/v1/jobs/{job_id}/cancel")
    server.wait_for_state(job_id, "cancelled")
    assert gone(trainer)
    assert server.get(f"/v1/jobs/{job_id}/attempts")["data"][0]["exit_code"] == -signal.SIGKILL


def test_a_busy_device_is_waited_for(start_server, dataset, tmp_path):
    """The trainer itself finds the device locked by somebody outside the service, and says so."""
    lock = tmp_path / "var" / "locks" / "cpu.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        server = start_server(retry_delay_seconds=0.1)
        job_id = server.post("/v1/jobs", job_request(dataset, max_steps=1))["id"]
        server.wait_for_attempt_end(job_id)
    job = server.wait_for_state(job_id, "succeeded")
    attempts = server.get(f"/v1/jobs/{job_id}/attempts")["data"]
    assert {(attempt["reason"], attempt["exit_code"]) for attempt in attempts[1:]} == {("device_busy", 76)}
    assert job["num_attempts"] == len(attempts) >= 2


def test_a_poisoned_job_ends_with_the_trainers_last_error(server, dataset, tmp_path):
    """The dataset disappears between submission and training: the trainer says so, once, and that
    is final.
    """
    blocker = submit(server, dataset)
    path = tmp_path / "var" / "short-lived.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(dataset.read_bytes())
    job_id = server.post("/v1/jobs", job_request(dataset) | {"dataset": {"path": str(path)}})["id"]
    path.unlink()
    server.post(f"/v1/jobs/{blocker}/cancel")
    job = wait_for(lambda: ended(server, job_id), "the job to end", 90)
    assert (job["state"], job["reason"], job["num_attempts"]) == ("failed", "input", 1)
    assert job["field"] == "dataset.path"
    assert "short-lived.jsonl" in job["detail"]


def ended(server, job_id):
    job = server.get(f"/v1/jobs/{job_id}")
    return job if job["finished_at"] else None
