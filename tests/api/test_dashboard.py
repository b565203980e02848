"""What dashboards add up: against plain arithmetic on what was reported."""

import math
from collections import Counter
from random import Random

import pytest
from sqlalchemy import delete

from chunkplan.service.db.tables import MetricRow, SampleRow
from chunkplan.service.execution.ledger import Ledger
from chunkplan.service.profiles.percentiles import bucket_of, percentiles
from tests.support.requests import job_request
from tests.support.run import STARTED, Reports, step

GIB = 1 << 30


@pytest.fixture
def ledger(services, settings, clock):
    return Ledger(services.database, settings, clock, services.supervisor.owner)


@pytest.fixture
def reports(ledger, tmp_path):
    return Reports(ledger, tmp_path)


@pytest.fixture
def start(client, clock, dataset, ledger, services):
    """Submits a job and gives it to the processor."""

    def start(seed=0):
        clock.advance(seconds=1)
        submitted = client.post("/v1/jobs", json=job_request(dataset, seed=seed)).json()
        return ledger.claim(services.supervisor.devices[-1]).handle, submitted

    return start


@pytest.fixture
def plan(client):
    return lambda job: client.get(f"/v1/plans/{job['plan_id']}").json()


def measured(number, phases, **changes):
    samples = [
        {"phase": phase, "allocated_bytes": size, "reserved_bytes": size * 2, "host_bytes": 7, "seconds": 0.1}
        for phase, size in phases.items()
    ]
    return step(number, samples=samples, **changes)


def rows(client, name, **parameters):
    response = client.get(f"/v1/dashboard/{name}", params=parameters)
    assert response.status_code == 200, response.text
    return response.json()["data"]


def test_usage_adds_up_steps_devices_and_bytes_by_day(client, clock, reports, start, plan, services):
    handle, job = start()
    at = "2026-01-01T23:59:59Z", "2026-01-02T00:00:01Z"
    first = [measured(1, {"forward": 100, "backward": 300}, time=at[0], seconds=1.0), step(2, time=at[0], samples=[])]
    second = [measured(3, {"forward": 500}, time=at[1], seconds=3.0)]
    reports.write(handle, STARTED, *first)
    reports.write(handle, *second)
    clock.advance(hours=36)
    today, tomorrow = rows(client, "usage")
    assert (today["day"], tomorrow["day"]) == ("2026-01-01", "2026-01-02")
    assert (today["num_jobs"], today["num_steps"], today["num_tokens"], today["train_seconds"]) == (1, 2, 128, 1.5)
    assert (tomorrow["num_steps"], tomorrow["train_seconds"]) == (1, 3.0)
    assert today["measured_bytes"] == today["measured_peak_bytes"] == 300
    assert tomorrow["measured_bytes"] == 500
    assert today["planned_bytes"] == plan(job)["peak"]["upper_bytes"]
    assert (today["project"], today["id"]) == ("default", "2026-01-01@default")
    running = [today["device_seconds"], tomorrow["device_seconds"]]
    assert running == [86399.0, 43201.0], "what still runs counts up to now"
    reports.complete(handle, measured(4, {"forward": 200}, time=at[1], seconds=1.0))
    with services.database.write() as session:  # nothing is added up from raw rows
        session.execute(delete(SampleRow))
        session.execute(delete(MetricRow))
    today, tomorrow = rows(client, "usage")
    assert [today["device_seconds"], tomorrow["device_seconds"]] == running
    assert (tomorrow["measured_bytes"], tomorrow["measured_peak_bytes"]) == (425, 500)
    assert [row["day"] for row in rows(client, "usage", days=1)] == ["2026-01-02"]


def test_steps_taken_again_count_as_used(client, reports, ledger, start, services, clock, settings):
    handle, _ = start()
    reports.write(handle, STARTED, step(1), step(2))
    ledger.finish(handle, None)
    clock.advance(seconds=settings.retry_delay_seconds)
    again = ledger.claim(services.supervisor.devices[-1]).handle
    reports.write(again, STARTED, step(1))
    (today,) = rows(client, "usage")
    assert (today["num_jobs"], today["num_steps"]) == (1, 3)


def test_accuracy_by_every_dimension(client, clock, reports, start, plan):
    errors = []
    for number, shift in enumerate((0.5, 0.8, 1.25)):
        handle, job = start(seed=number)
        phases = plan(job)["chunks"]
        steps = [
            measured(
                chunk["index"] + 1,
                {"forward": round(chunk["peak_allocated_bytes"] * shift)},
                chunk_index=chunk["index"],
            )
            for chunk in phases
        ]
        reports.complete(handle, *steps)
        profile = client.get(f"/v1/jobs/{job['id']}").json()["profile_id"]
        found = client.get(f"/v1/profiles/{profile}/residuals", params={"phase": "step"}).json()["data"]
        errors.append([residual["relative_error"] for residual in found])
        clock.advance(days=1)
    (row,) = rows(client, "accuracy")
    worst = sorted(max(map(abs, found)) for found in errors)
    assert row["id"] == f"{row['model']}@{row['gpu']}"
    assert (row["num_profiles"], row["num_under"]) == (3, sum(min(found) < 0 for found in errors))
    assert row["max_absolute_error"] == worst[-1]
    assert [row["p50"], row["p99"]] == pytest.approx([worst[1], worst[-1]], rel=0.02)
    assert row["min_error"] == min(min(found) for found in errors)
    means = [sum(found) / len(found) for found in errors]
    assert row["mean_error"] == pytest.approx(sum(means) / 3)
    series = rows(client, "accuracy", by="day")
    assert [(row["day"], row["num_profiles"]) for row in series] == [(f"2026-01-0{day}", 1) for day in (1, 2, 3)]
    assert [row["mean_error"] for row in series] == pytest.approx(means)
    assert {row["phase"] for row in rows(client, "accuracy", by="phase")} == {"forward", "step"}
    assert [row["day"] for row in rows(client, "accuracy", by="day", days=2)] == ["2026-01-03"]
    assert rows(client, "accuracy", model="another") == []
    assert rows(client, "accuracy", phase="forward")[0]["num_profiles"] == 3


def test_the_summary_shows_what_is_next_what_runs_and_what_has_ended(client, reports, start, dataset):
    done, _ = start(seed=1)
    reports.complete(done, measured(1, {"forward": GIB}))
    running, _ = start(seed=2)
    reports.write(running, STARTED, measured(1, {"forward": 3 * GIB, "backward": 2 * GIB}))
    waiting = [
        client.post("/v1/jobs", json=job_request(dataset) | {"priority": priority}).json()["id"] for priority in (0, 7)
    ]
    summary = client.get("/v1/dashboard/summary").json()
    assert [job["id"] for job in summary["queue"]] == waiting[::-1]
    assert [job["id"] for job in summary["active"]] == [running.job_id]
    (recent,) = summary["recent"]
    assert (recent["id"], recent["state"]) == (done.job_id, "succeeded")
    assert recent["profile_id"] == summary["latest_profiles"][0]["id"]
    device = summary["devices"][-1]
    assert (device["job_id"], device["measured_bytes"]) == (running.job_id, 3 * GIB)
    metrics = client.get(f"/v1/jobs/{running.job_id}/metrics").json()["data"]
    assert (metrics[0]["allocated_bytes"], metrics[0]["reserved_bytes"]) == (3 * GIB, 6 * GIB)


@pytest.mark.parametrize("query", ["by=colour", "days=0", "by=", "phase=%00", "by=day&by=day&by=day&by=day&by=day"])
def test_what_makes_no_sense_is_refused(client, query):
    assert client.get(f"/v1/dashboard/accuracy?{query}").status_code == 422


def test_too_many_groups_are_refused_rather_than_cut(client, reports, start, monkeypatch):
    handle, _ = start()
    reports.complete(handle, step(1))
    monkeypatch.setattr("chunkplan.service.dashboard.repository._MAX_ROWS", 1)
    response = client.get("/v1/dashboard/accuracy?by=phase")
    assert (response.status_code, response.json()["errors"][0]["field"]) == (422, "by")


def test_percentiles_from_counts_are_within_two_per_cent():
    generator = Random(7)
    errors = sorted(math.exp(generator.gauss(-5, 1.5)) for _ in range(2000))
    counts = Counter(bucket_of(error) for error in errors)
    shares = [0.001, 0.5, 0.9, 0.95, 0.99, 1.0]
    exact = [errors[math.ceil(share * len(errors)) - 1] for share in shares]
    assert percentiles(counts, shares, highest=errors[-1]) == pytest.approx(exact, rel=0.0201)


def test_errors_of_nothing_and_of_everything_have_a_bucket_too():
    assert percentiles({bucket_of(0.0): 5}, [0.5], highest=0.0) == [0.0]
    assert percentiles({bucket_of(1e300): 1}, [0.5], highest=1e300)[0] <= 1e300
