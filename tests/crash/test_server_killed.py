"""kill -9 of the server during training: nothing is lost, and no process survives it."""

import pytest

from tests.support.live import gone
from tests.support.requests import job_request
from tests.support.waiting import wait_for


@pytest.mark.slow
def test_a_job_survives_kill_9_of_its_server(start_server, dataset):
    server = start_server()
    job_id = server.post("/v1/jobs", job_request(dataset, max_steps=150, checkpoint_every=5))["id"]
    server.wait_for_events(job_id, "checkpoint", 2)
    assert len(server.trainers()) == 1
    children = server.children()
    server.kill()
    wait_for(lambda: all(map(gone, children)), "the trainer and the planner to follow their server", 30)

    restarted = start_server()
    started = restarted.wait_for_events(job_id, "started", 2)
    resumed_step = started[-1]["data"]["resumed_step"]
    assert resumed_step >= 10
    job = restarted.wait_for_state(job_id, "succeeded")
    assert job["progress"]["step"] == 150
    assert job["coverage"]["not_updated"] == []

    second, first = restarted.get(f"/v1/jobs/{job_id}/attempts")["data"]
    assert (first["reason"], first["exit_code"]) == ("server_lost", None)
    assert (second["reason"], second["exit_code"], second["resumed_step"]) == ("completed", 0, resumed_step)
    assert loss_curve(restarted, job_id) == list(range(1, 151))
    steps = [event["data"]["step"] for event in restarted.events(job_id) if event["type"] == "step"]
    assert steps == [*range(1, first["last_step"] + 1), *range(resumed_step + 1, 151)], "every line once"
    assert restarted.get("/v1/profiles", job_id=job_id)["data"][0]["num_samples"] > 0


def loss_curve(server, job_id):
    rows, after = [], None
    while True:
        page = server.get(f"/v1/jobs/{job_id}/metrics", kind="train", limit=1000, **({"after": after} if after else {}))
        rows += [row["step"] for row in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            return rows
