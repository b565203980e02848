"""Health, readiness, metrics, documentation, dashboards."""

import pytest

from tests.support.requests import job_request


def test_health_does_not_depend_on_anything(client):
    assert client.get("/healthz").json() == {"status": "ok"}


def test_a_server_without_a_supervisor_is_not_ready(client):
    response = client.get("/readyz")
    assert response.status_code == 503
    assert response.json()["code"] == "not_ready"
    assert response.headers["retry-after"]


def test_a_started_server_is_ready_and_stops(client):
    with client:
        assert client.get("/readyz").json() == {"status": "ok"}
    assert client.get("/readyz").status_code == 503


def test_metrics_name_routes_by_their_template(client, dataset):
    job_id = client.post("/v1/jobs", json=job_request(dataset)).json()["id"]
    client.get(f"/v1/jobs/{job_id}")
    client.get("/nowhere")
    text = client.get("/metrics").text
    assert 'chunkplan_requests_total{method="GET",route="/v1/jobs/{job_id}",status="200"} 1.0' in text
    assert 'chunkplan_requests_total{method="GET",route="unmatched",status="404"} 1.0' in text
    assert "chunkplan_queue_depth 1.0" in text
    assert 'chunkplan_jobs{state="queued"} 1.0' in text
    assert job_id not in text


def test_the_summary_counts_jobs_and_names_devices(client, clock, dataset):
    client.post("/v1/jobs", json=job_request(dataset))
    clock.advance(seconds=30)
    summary = client.get("/v1/dashboard/summary").json()
    assert summary["jobs"]["queued"] == summary["queue_depth"] == 1
    assert summary["oldest_queued_seconds"] == 30
    assert summary["devices"][-1]["name"] == "cpu"
    assert summary["num_plans"] == 1


@pytest.mark.parametrize("path", ["/v1/dashboard/accuracy", "/v1/dashboard/usage"])
def test_dashboards_without_data_are_empty_lists(client, path):
    assert client.get(path).json()["data"] == []


def test_the_contract_is_documented(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/v1/models",
        "/v1/gpus",
        "/v1/plans",
        "/v1/plans/compare",
        "/v1/plans/{plan_id}",
        "/v1/plans/{plan_id}/timeline",
        "/v1/jobs",
        "/v1/jobs/{job_id}",
        "/v1/jobs/{job_id}/cancel",
        "/v1/jobs/{job_id}/pause",
        "/v1/jobs/{job_id}/resume",
        "/v1/jobs/{job_id}/events",
        "/v1/jobs/{job_id}/events/stream",
        "/v1/jobs/{job_id}/attempts",
        "/v1/jobs/{job_id}/metrics",
        "/v1/jobs/{job_id}/checkpoints",
        "/v1/jobs/{job_id}/artifacts",
        "/v1/jobs/{job_id}/artifacts/{name}",
        "/v1/files",
        "/v1/files/{file_id}",
        "/v1/files/{file_id}/content",
        "/v1/fine_tuning/jobs",
        "/v1/fine_tuning/jobs/{job_id}",
        "/v1/fine_tuning/jobs/{job_id}/cancel",
        "/v1/fine_tuning/jobs/{job_id}/checkpoints",
        "/v1/fine_tuning/jobs/{job_id}/events",
        "/v1/fine_tuning/jobs/{job_id}/events/stream",
        "/v1/fine_tuning/jobs/{job_id}/pause",
        "/v1/fine_tuning/jobs/{job_id}/resume",
        "/v1/profiles",
        "/v1/profiles/{profile_id}",
        "/v1/profiles/{profile_id}/samples",
        "/v1/profiles/{profile_id}/residuals",
        "/v1/dashboard/summary",
        "/v1/dashboard/accuracy",
        "/v1/dashboard/usage",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    assert client.get("/docs").status_code == 200
