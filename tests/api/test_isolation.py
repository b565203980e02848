"""For every route that there is: nobody without a key, nobody without the scope, nobody from
another project.
"""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from sqlalchemy import func, select

from chunkplan.service.access.gate import OPEN_PATHS
from chunkplan.service.db.tables import (
    ArtifactRow,
    AttemptRow,
    CheckpointRow,
    FileRow,
    JobDayRow,
    JobRow,
    MetricRow,
    PlanRow,
    ProfilePhaseRow,
    ProfileRow,
    SampleRow,
)
from chunkplan.service.job_states import JobState
from chunkplan.service.kit.ids import new_id
from tests.conftest import TINY_MODEL
from tests.support.requests import job_request

PLAN = {"model": TINY_MODEL, "gpu": "cpu", "training": {"seq_len": 64, "schedule": {"num_chunks": 4}}}
MISSING = "0" * 26
RESIDUAL = {"chunk_index": 0, "phase": "step", "predicted_bytes": 1, "measured_bytes": 1, "relative_error": 0.0}


@pytest.fixture
def key(services):
    def create(project, *scopes):
        _, text = services.access.create(name="test", project=project, scopes=scopes, expires_at=None)
        return {"Authorization": f"Bearer {text}"}

    return create


@pytest.fixture
def routes(client):
    """(method, path) of everything that needs a key."""
    paths = client.get("/openapi.json").json()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() if path not in OPEN_PATHS for method in methods]


@pytest.fixture
def alpha(client, services, settings, clock, dataset, key):
    """A project that has one of everything."""
    headers = key("alpha", "submit")
    upload = client.post("/v1/files", files={"file": ("data.jsonl", dataset.read_bytes())}, headers=headers).json()
    plan = client.post("/v1/plans", json=PLAN, headers=headers).json()
    job = client.post("/v1/jobs", json=job_request(dataset), headers=headers).json()
    now = clock.now()
    made = {"job_id": job["id"], "attempt_id": new_id("att", now)}
    run_dir = settings.runs_dir / job["id"]
    (run_dir / "artifacts" / "tiny").mkdir(parents=True)
    (run_dir / "artifacts" / "tiny" / "rows.jsonl").write_bytes(dataset.read_bytes())
    figures = {"allocated_bytes": 1, "reserved_bytes": 1, "host_bytes": 1, "seconds": 1.0}
    errors = {"project": "alpha", "model": TINY_MODEL, "gpu": "cpu", "mean_error": 0.0, "min_error": 0.0}
    errors |= {"mean_absolute_error": 0.0, "max_absolute_error": 0.0}
    with services.database.write() as session:
        session.add(
            AttemptRow(
                id=made["attempt_id"],
                job_id=job["id"],
                number=1,
                token="t",
                owner="host/1/1.0",
                host="host",
                device="cpu",
                upper_bytes=1,
                lease_expires_at=now + timedelta(hours=1),
                created_at=now,
            )
        )
        session.flush()
        profile = ProfileRow(
            id=new_id("prof", now),
            project="alpha",
            job_id=job["id"],
            plan_id=job["plan_id"],
            model=TINY_MODEL,
            gpu="cpu",
            device="cpu",
            num_samples=1,
            predicted_peak_bytes=1,
            measured_peak_bytes=1,
            mean_error=0.0,
            mean_absolute_error=0.0,
            max_absolute_error=0.0,
            min_error=0.0,
            predicted_step_seconds=1.0,
            residuals=[RESIDUAL],
            created_at=now,
        )
        session.add_all(
            [
                profile,
                CheckpointRow(
                    id=new_id("ckpt", now), step=1, path="c", size_bytes=1, sha256="0", created_at=now, **made
                ),
                ArtifactRow(
                    id=new_id("art", now),
                    name="rows.jsonl",
                    path="artifacts/tiny/rows.jsonl",
                    size_bytes=1,
                    sha256="0",
                    created_at=now,
                    **made,
                ),
                MetricRow(kind="train", step=1, num_tokens=1, seconds=1.0, created_at=now, **made),
                SampleRow(step=1, chunk_index=0, phase="forward", created_at=now, **figures, **made),
                JobDayRow(project="alpha", job_id=job["id"], day=now.date(), num_steps=1),
                ProfilePhaseRow(profile_id=profile.id, phase="step", day=now.date(), num_chunks=1, bucket=0, **errors),
            ]
        )
    parameters = {
        "job_id": job["id"],
        "plan_id": plan["id"],
        "file_id": upload["id"],
        "profile_id": profile.id,
        "name": "rows.jsonl",
    }
    return SimpleNamespace(headers=headers, parameters=parameters, job=job, run_dir=run_dir)


def missing(parameters):
    """Ids that look like the given ones and that nobody has."""
    return {
        name: value if name == "name" else f"{value.partition('_')[0]}_{MISSING}" for name, value in parameters.items()
    }


def test_no_route_answers_without_a_key(client, routes, alpha):
    for method, path in routes:
        answer = client.request(method, path.format(**alpha.parameters))
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated"), (method, path)
        assert set(answer.json()) == {"type", "title", "status", "detail", "instance", "code", "errors", "error"}


def test_no_route_answers_a_key_without_its_scope(client, routes, alpha, key):
    read, submit = key("alpha", "read"), key("alpha", "submit")
    for method, path in routes:
        if path != "/metrics" and method == "GET":
            continue
        headers = submit if path == "/metrics" else read
        answer = client.request(method, path.format(**alpha.parameters), headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (403, "scope_missing"), (method, path)
    assert client.get("/metrics", headers=key("ops", "admin")).status_code == 200
    job = client.get(f"/v1/jobs/{alpha.job['id']}", headers=read).json()
    assert job["state"] == "queued"


def test_the_owner_reaches_what_others_must_not(client, routes, alpha):
    """So that the 404s of the next test say something."""
    for method, path in routes:
        if method == "GET" and path != "/metrics" and not path.endswith("/events/stream"):
            answer = client.get(path.format(**alpha.parameters), headers=alpha.headers)
            assert answer.status_code == 200, (path, answer.text)
            is_list = answer.text.startswith('{"object":"list"')
            assert answer.json()["data"] if is_list else answer.content, path


def test_another_project_sees_nothing_and_cannot_tell_it_from_what_is_not_there(client, routes, alpha, key, services):
    beta = key("beta", "submit", "admin")
    unknown = missing(alpha.parameters)
    for method, path in routes:
        if "{" in path:
            foreign = client.request(method, path.format(**alpha.parameters), headers=beta)
            absent = client.request(method, path.format(**unknown), headers=beta)
            assert foreign.status_code == absent.status_code == 404, (method, path)
            text = foreign.text
            for name, value in alpha.parameters.items():
                text = text.replace(value, unknown[name])
            assert text == absent.text, (method, path)
        elif method == "GET" and path not in {"/v1/models", "/v1/gpus", "/metrics", "/v1/dashboard/summary"}:
            answer = client.get(path, headers=beta)
            assert answer.json()["data"] == [], path
    summary = client.get("/v1/dashboard/summary", headers=beta).json()
    assert not any(value in str(summary) for value in alpha.parameters.values())
    assert (summary["queue_depth"], summary["num_plans"], summary["num_profiles"]) == (0, 0, 0)
    with services.database.read() as session:
        assert session.get(JobRow, alpha.job["id"]).state is JobState.QUEUED
        assert session.scalar(select(func.count()).select_from(FileRow)) == 1


def test_dashboards_over_every_project_are_for_admins(client, alpha, key):
    for name in ("summary", "accuracy", "usage"):
        path = f"/v1/dashboard/{name}?projects=all"
        assert client.get(path, headers=alpha.headers).json()["code"] == "scope_missing"
        assert client.get(path, headers=key("ops", "admin")).status_code == 200
    everything = client.get("/v1/dashboard/summary?projects=all", headers=key("ops", "admin")).json()
    assert (everything["queue_depth"], everything["num_profiles"]) == (1, 1)
    own = client.get("/v1/dashboard/summary", headers=key("ops", "admin")).json()
    assert (own["queue_depth"], own["num_profiles"]) == (0, 0)


@pytest.mark.parametrize(
    ("name", "field"), [("file_id", "dataset.file_id"), ("plan_id", "plan_id"), ("profile_id", None), ("job_id", None)]
)
def test_ids_of_others_are_unknown_in_bodies_and_filters_too(client, alpha, key, dataset, name, field):
    beta = key("beta", "submit")

    def messages(identifier):
        if field is None:
            noun = name.removesuffix("_id")
            answers = [client.get(f"/v1/{noun}s", params={"after": identifier}, headers=beta)]
            answers.append(client.get("/v1/profiles", params={"job_id": identifier}, headers=beta))
        else:
            given = {"dataset": {"file_id": identifier}} if name == "file_id" else {"plan_id": identifier}
            answers = [client.post("/v1/jobs", json=job_request(dataset) | given, headers=beta)]
        assert all(answer.status_code == 422 or answer.json()["data"] == [] for answer in answers)
        return [answer.text.replace(identifier, "ID") for answer in answers]

    assert messages(alpha.parameters[name]) == messages(missing(alpha.parameters)[name])


def test_paths_into_the_service_are_open_to_their_project_only(client, alpha, key, settings, dataset):
    beta = key("beta", "submit")
    upload = settings.files_dir / f"{alpha.parameters['file_id']}.jsonl"
    artifact = alpha.run_dir / "artifacts" / "tiny" / "rows.jsonl"
    link = settings.dataset_roots[0] / "link.jsonl"
    link.symlink_to(upload)
    for path in (upload, artifact, link):
        body = job_request(dataset) | {"dataset": {"path": str(path)}}
        own = client.post("/v1/jobs?dry_run=true", json=body, headers=alpha.headers)
        assert own.status_code == 200, own.text
        other = client.post("/v1/jobs?dry_run=true", json=body, headers=beta).json()
        assert other["errors"] == [
            {"field": "dataset.path", "message": f"{path} is outside the folders that this service may read"}
        ]
    model = {"path": str(artifact.parent)}
    for route in ("/v1/jobs", "/v1/plans"):
        body = (job_request(dataset) if route == "/v1/jobs" else PLAN) | {"model": model}
        (error,) = client.post(route, json=body, headers=beta).json()["errors"]
        assert error["field"] == "model.path"
        assert "outside" in error["message"]
    nobodys = [settings.locks_dir / "cpu.lock"]
    nobodys += [settings.data_dir.parent / name for name in ("chunkplan.db", "chunkplan.db-wal")]
    for path in nobodys if settings.database_url.startswith("sqlite") else nobodys[:1]:
        body = job_request(dataset) | {"dataset": {"path": str(path)}}
        (error,) = client.post("/v1/jobs", json=body, headers=alpha.headers).json()["errors"]
        assert "outside" in error["message"], path


def test_a_plan_is_made_once_and_each_project_learns_only_of_its_own(client, alpha, key, clock, services):
    beta = key("beta", "submit")
    clock.advance(days=1)
    mine = client.post("/v1/plans", json=PLAN, headers=beta)
    assert mine.status_code == 201
    assert mine.json()["id"] == alpha.parameters["plan_id"]
    (listed,) = client.get("/v1/plans", headers=beta).json()["data"]
    assert listed["created_at"].startswith("2026-01-02")
    assert client.post("/v1/plans", json=PLAN, headers=beta).status_code == 200
    with services.database.read() as session:
        assert session.scalar(select(func.count()).select_from(PlanRow).where(PlanRow.id == listed["id"])) == 1


def test_names_and_idempotency_keys_are_each_projects_own(client, alpha, key, dataset):
    beta = key("beta", "submit") | {"Idempotency-Key": "order-66"}
    first = client.post("/v1/jobs", json=job_request(dataset), headers=beta).json()
    other = client.post("/v1/jobs", json=job_request(dataset), headers=alpha.headers | {"Idempotency-Key": "order-66"})
    assert other.json()["id"] != first["id"]
    assert "idempotency-replayed" not in other.headers
    assert first["output_name"].endswith("-v1")
    assert other.json()["output_name"].endswith("-v2")
    again = client.post("/v1/jobs", json=job_request(dataset), headers=beta)
    assert again.json()["id"] == first["id"]
    assert again.headers["idempotency-replayed"] == "true"
