"""Real trainers on several devices of one host, side by side where they fit, under two servers."""

import json

import pytest

from tests.support.requests import job_request

# Counting what runs is tested on both databases in tests/api/test_queue.py.
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("database_url", ["postgres"], indirect=True)]


def test_two_servers_fill_two_devices_and_never_more(start_server, client, dataset):
    upper_bytes = client.post("/v1/jobs?dry_run=true", json=job_request(dataset)).json()["predicted_bytes"]
    devices = [
        {"name": "cpu:0", "memory_bytes": int(2.5 * upper_bytes), "max_jobs": 5},
        {"name": "cpu:1", "memory_bytes": int(1.5 * upper_bytes)},
    ]
    servers = [start_server(devices=json.dumps(devices)) for _ in range(2)]
    request = job_request(dataset, max_steps=5000)
    jobs = [
        servers[i % 2].post("/v1/jobs", request | {"gpu": device})["id"]
        for i, device in enumerate(["cpu:0", "cpu:0", "cpu:1", "cpu:0"])
    ]
    *running, waiting = jobs
    for job_id in running:
        servers[0].wait_for_events(job_id, "step", 1)
    assert sum(len(server.trainers()) for server in servers) == 3
    summary = servers[1].get("/v1/dashboard/summary")
    shared, single = summary["devices"]
    assert (shared["job_ids"], single["job_ids"]) == (running[:2], running[2:])
    assert upper_bytes * 2 == shared["planned_bytes"] <= shared["memory_bytes"]
    assert [job["id"] for job in summary["queue"]] == [waiting]
    servers[0].post(f"/v1/jobs/{running[0]}/cancel")
    servers[1].wait_for_events(waiting, "step", 1)
    (attempt,) = servers[1].get(f"/v1/jobs/{waiting}/attempts")["data"]
    assert attempt["device"] == "cpu:0"
    for job_id in jobs[1:]:
        servers[1].post(f"/v1/jobs/{job_id}/cancel")
