"""Submitting, listing and steering jobs; no supervisor runs, so what is submitted stays queued."""

import pytest

from tests.support.requests import job_request


@pytest.fixture
def submit(client, dataset):
    def submit(**changes):
        response = client.post("/v1/jobs", json=job_request(dataset) | changes)
        assert response.status_code == 201, response.text
        return response.json()

    return submit


def test_a_submitted_job_is_queued_with_its_plan(client, dataset):
    response = client.post("/v1/jobs", json=job_request(dataset))
    assert response.status_code == 201
    job = response.json()
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["id"].startswith("job_")
    assert (job["state"], job["reason"]) == ("queued", "submitted")
    plan = client.get(f"/v1/plans/{job['plan_id']}").json()
    assert plan["request"]["training"]["schedule"]["num_chunks"] == 4
    assert client.get(f"/v1/jobs/{job['id']}").json() == job
    events = client.get(f"/v1/jobs/{job['id']}/events").json()["data"]
    assert [(event["id"], event["type"], event["data"]["state"]) for event in events] == [("1", "state", "queued")]


def test_an_automatic_schedule_is_fixed_when_the_job_is_stored(client, dataset):
    job = client.post("/v1/jobs", json=job_request(dataset, schedule="auto")).json()
    assert job["request"]["training"]["schedule"] == "auto"
    plan = client.get(f"/v1/plans/{job['plan_id']}").json()
    assert job["training"]["schedule"] == plan["schedule"]


def test_a_dry_run_checks_everything_and_stores_no_job(client, dataset):
    response = client.post("/v1/jobs", params={"dry_run": True}, json=job_request(dataset))
    assert response.status_code == 200
    answer = response.json()
    assert answer["admitted"]
    assert answer["num_rows"] == 64
    assert answer["predicted_bytes"] <= answer["available_bytes"]
    assert client.get(f"/v1/plans/{answer['plan_id']}").status_code == 200
    assert client.get("/v1/jobs").json()["data"] == []


def test_outputs_are_numbered_and_short_runs_are_warned_about(client, dataset):
    first, second = (client.post("/v1/jobs", json=job_request(dataset)).json() for _ in range(2))
    assert first["output_name"] == "smollm2-135m-instruct-chunkft-chats-v1"
    assert second["output_name"] == "smollm2-135m-instruct-chunkft-chats-v2"
    (warning,) = first["warnings"]
    assert warning.startswith("8 updates over 4 chunks change each parameter only about 2 times")
    assert client.get(f"/v1/jobs/{first['id']}").json()["warnings"] == [warning]
    epochs = job_request(dataset, max_steps=None, epochs=1)
    answer = client.post("/v1/jobs", params={"dry_run": True}, json=job_request(dataset)).json()
    assert answer["warnings"] == [warning]
    assert client.post("/v1/jobs", params={"dry_run": True}, json=epochs).json()["warnings"] == []
    short = {"max_steps": None, "epochs": 0.1}
    for options, num_warnings in ((short, 1), (short | {"packing": True}, 0)):  # packed rows make nobody knows how many
        answer = client.post("/v1/jobs", params={"dry_run": True}, json=job_request(dataset, **options)).json()
        assert len(answer["warnings"]) == num_warnings
    named = client.post("/v1/jobs", json=job_request(dataset, max_steps=40) | {"output": {"name": "welders"}}).json()
    assert (named["output_name"], named["warnings"]) == ("welders", [])


def test_lora_jobs_are_planned_and_admitted(client, dataset):
    lora = {"method": "lora", "lora": {"rank": 4}, "schedule": {}}
    job = client.post("/v1/jobs", json=job_request(dataset, **lora)).json()
    assert job["output_name"] == "smollm2-135m-instruct-lora-chats-v1"
    plan = client.get(f"/v1/plans/{job['plan_id']}").json()
    facts = plan["model"]
    assert 0 < facts["num_trainable_parameters"] < facts["num_parameters"] / 10
    body = {"model": plan["request"]["model"], "gpus": ["rtx-4090"], "methods": ["chunkft", "full", "lora"]}
    cells = client.post("/v1/plans/compare", json=body).json()["data"]
    assert [cell["method"] for cell in cells] == ["chunkft", "full", "lora"]
    assert len({cell["id"] for cell in cells}) == 3


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_does_not_fit_is_409_with_alternatives(client, dataset, dry_run):
    gpu = {"name": "small", "kind": "cpu", "memory_bytes": 2**20}
    body = job_request(dataset) | {"gpu": gpu}
    response = client.post("/v1/jobs", json=body, params={"dry_run": dry_run})
    assert response.status_code == 409
    problem = response.json()
    assert problem["code"] == "does_not_fit"
    assert problem["available_bytes"] == 2**20
    assert problem["predicted_bytes"] > problem["available_bytes"]
    assert problem["alternatives"][0]["why"] in problem["detail"]
    assert client.get("/v1/jobs").json()["data"] == []


def test_a_device_that_is_not_here_is_refused_by_name(client, dataset):
    response = client.post("/v1/jobs", json=job_request(dataset) | {"gpu": "mi300x"})
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == "gpu"
    assert "cpu" in response.json()["detail"]


def test_a_given_plan_is_used_when_it_is_for_the_same_run(client, dataset):
    training = job_request(dataset)["training"]
    memory = {name: training[name] for name in ("seq_len", "micro_batch_size", "precision", "schedule")}
    request = {"model": job_request(dataset)["model"], "gpu": "cpu", "training": memory}
    plan_id = client.post("/v1/plans", json=request).json()["id"]
    job = client.post("/v1/jobs", json=job_request(dataset) | {"plan_id": plan_id}).json()
    assert job["plan_id"] == plan_id
    other = client.post("/v1/jobs", json=job_request(dataset, seq_len=32) | {"plan_id": plan_id})
    assert other.status_code == 422
    assert other.json()["errors"] == [{"field": "plan_id", "message": f"{plan_id} was made for another training"}]


def test_jobs_are_paged_newest_first_and_filtered(client, clock, submit):
    ids = []
    for number in range(5):
        clock.advance(seconds=1)
        ids.append(submit(name=f"job-{number}")["id"])
    first = client.get("/v1/jobs", params={"limit": 3}).json()
    assert [job["id"] for job in first["data"]] == ids[:1:-1]
    assert first["has_more"]
    assert (first["first_id"], first["last_id"]) == (ids[4], ids[2])
    second = client.get("/v1/jobs", params={"limit": 3, "after": first["last_id"]}).json()
    assert [job["id"] for job in second["data"]] == ids[1::-1]
    assert not second["has_more"]
    client.post(f"/v1/jobs/{ids[2]}/cancel")
    assert [job["id"] for job in client.get("/v1/jobs", params={"state": "cancelled"}).json()["data"]] == [ids[2]]
    assert client.get("/v1/jobs", params={"model": "gpt2"}).json()["data"] == []


def test_a_queued_job_is_cancelled_at_once_and_again(client, submit):
    job_id = submit()["id"]
    for _ in range(2):
        response = client.post(f"/v1/jobs/{job_id}/cancel")
        assert response.status_code == 202
        assert response.json()["state"] == "cancelled"
    events = client.get(f"/v1/jobs/{job_id}/events").json()["data"]
    assert [event["data"]["state"] for event in events] == ["queued", "cancelled"]


def test_pausing_and_resuming_can_be_repeated(client, submit):
    job_id = submit()["id"]
    for verb, state in (("pause", "paused"), ("pause", "paused"), ("resume", "queued"), ("resume", "queued")):
        response = client.post(f"/v1/jobs/{job_id}/{verb}")
        assert (response.status_code, response.json()["state"]) == (202, state)


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_what_has_ended_cannot_be_steered(client, submit, verb):
    job_id = submit()["id"]
    client.post(f"/v1/jobs/{job_id}/cancel")
    response = client.post(f"/v1/jobs/{job_id}/{verb}")
    assert response.status_code == 409
    assert response.json()["code"] == "job_state"


@pytest.mark.parametrize(
    "path",
    ["", "/events", "/events/stream", "/attempts", "/metrics", "/checkpoints", "/artifacts", "/artifacts/model"],
)
def test_an_unknown_job_is_404_everywhere(client, path):
    response = client.get(f"/v1/jobs/job_missing{path}")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume"])
def test_an_unknown_job_cannot_be_steered(client, verb):
    assert client.post(f"/v1/jobs/job_missing/{verb}").status_code == 404
