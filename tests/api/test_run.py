"""A whole run through a real server: submit, follow, download, compare with the plan. The server never loads
torch."""

import hashlib

import httpx
import psutil
import pytest

from tests.support.requests import job_request


@pytest.mark.slow
def test_a_run_from_submission_to_residuals(start_server, dataset, tmp_path):
    server = start_server()
    job_id = server.post("/v1/jobs", job_request(dataset, max_steps=8))["id"]
    streamed = read_stream(server, job_id)
    job = server.get(f"/v1/jobs/{job_id}")
    assert (job["state"], job["reason"]) == ("succeeded", "completed"), "the stream ends when the job has ended"
    assert job["progress"]["step"] == job["progress"]["total_steps"] == 8
    assert job["coverage"]["num_tensors_updated"] == job["coverage"]["num_tensors"]

    listed = server.get(f"/v1/jobs/{job_id}/events", limit=1000)["data"]
    assert [event["id"] for event in listed] == [identifier for identifier, _ in streamed]
    assert read_stream(server, job_id, last_event_id="5") == streamed[5:]
    assert [state for kind, state in streamed_states(listed)] == ["queued", "starting", "running", "succeeded"]

    metrics = server.get(f"/v1/jobs/{job_id}/metrics")["data"]
    evaluations = [metric["loss"] for metric in metrics if metric["kind"] == "eval"]
    assert evaluations[-1] < evaluations[0]
    assert [metric["chunk_index"] for metric in metrics if metric["kind"] == "train"] == [3, 2, 1, 0] * 2

    artifacts = {artifact["name"]: artifact for artifact in server.get(f"/v1/jobs/{job_id}/artifacts")["data"]}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(artifacts)
    content = server.http.get(f"/v1/jobs/{job_id}/artifacts/model.safetensors").content
    assert hashlib.sha256(content).hexdigest() == artifacts["model.safetensors"]["sha256"]
    assert server.http.get(f"/v1/jobs/{job_id}/artifacts/../../../chunkplan.db").status_code == 404
    assert server.http.get(f"/v1/jobs/{job_id}/artifacts/%2e%2e%2f%2e%2e%2fjob.json").status_code == 404
    assert server.get(f"/v1/jobs/{job_id}/checkpoints")["data"][0]["step"] == 4

    profile = server.get(f"/v1/profiles/{job['profile_id']}")
    assert profile["plan_id"] == job["plan_id"]
    residuals = server.get(f"/v1/profiles/{profile['id']}/residuals", phase="step")["data"]
    assert [residual["chunk_index"] for residual in residuals] == [0, 1, 2, 3]
    assert all(abs(residual["relative_error"]) < 0.03 for residual in residuals)
    samples = server.get(f"/v1/profiles/{profile['id']}/samples", chunk_index=3, limit=1000)["data"]
    assert {sample["phase"] for sample in samples} >= {"forward", "backward", "optimizer"}
    assert {sample["step"] for sample in samples} == {1, 5}

    summary = server.get("/v1/dashboard/summary")
    assert summary["jobs"]["succeeded"] == 1
    (latest,) = summary["latest_profiles"]
    assert latest.items() <= profile.items()
    assert profile["measured_process_bytes"] > profile["measured_peak_bytes"]
    (accuracy,) = server.get("/v1/dashboard/accuracy")["data"]
    assert accuracy["num_profiles"] == 1
    (usage,) = server.get("/v1/dashboard/usage")["data"]
    assert (usage["num_jobs"], usage["num_steps"]) == (1, 8)
    assert "chunkplan_residual_ratio_count 4.0" in server.http.get("/metrics").text
    run_dir = tmp_path / "var" / "jobs" / job_id
    assert not (run_dir / "checkpoints").exists(), "nothing resumes a job that has succeeded"
    assert list((run_dir / "tensorboard").iterdir())
    assert not any("libtorch" in region.path for region in psutil.Process(server.pid).memory_maps())


def read_stream(server, job_id, last_event_id=None):
    """(id, type) of every event until the stream ends."""
    headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
    events = []
    timeout = httpx.Timeout(90)
    with server.http.stream("GET", f"/v1/jobs/{job_id}/events/stream", headers=headers, timeout=timeout) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        fields = {}
        for line in response.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "id" in fields:
                events.append((fields["id"], fields["event"]))
                fields = {}
    return events


def streamed_states(events):
    return [(event["type"], event["data"]["state"]) for event in events if event["type"] == "state"]


def test_a_stream_refuses_what_is_no_event_id(client, dataset):
    job_id = client.post("/v1/jobs", json=job_request(dataset)).json()["id"]
    response = client.get(f"/v1/jobs/{job_id}/events/stream", headers={"Last-Event-ID": "latest"})
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == "Last-Event-ID"
