"""Bad input: the field is named, nothing is stored, and it is never our fault (no 500)."""

import json

import pytest
from sqlalchemy import func, select

from chunkplan.service.db.tables import IdempotencyRow, JobRow, PlanRow
from tests.conftest import TINY_MODEL
from tests.support.requests import job_request


def changed(body, path, value):
    """A copy of ``body`` with the value at a dotted path replaced."""
    copy = json.loads(json.dumps(body))
    *parents, last = path.split(".")
    inner = copy
    for key in parents:
        inner = inner.setdefault(key, {})
    inner[last] = value
    return copy


def refused(response, field):
    """The message for the one field that a refusal names."""
    assert response.status_code == 422, response.text
    problem = response.json()
    assert problem["code"] == "invalid_input"
    assert [error["field"] for error in problem["errors"]] == [field]
    return problem["errors"][0]["message"]


def stored(services, table=JobRow):
    with services.database.read() as session:
        return session.scalar(select(func.count()).select_from(table))


PLAN = {"model": TINY_MODEL, "gpu": "rtx-4090", "training": {"seq_len": 64, "schedule": {"num_chunks": 4}}}

BAD_TRAINING = [
    ("training.optimizer", "rprop", "training.optimizer"),
    ("training.schedule.num_chunks", 0, "training.schedule.num_chunks"),
    ("training.schedule.num_chunks", 100_000, "training.schedule.num_chunks"),
    ("training.schedule.num_chunks", "four", "training.schedule.num_chunks"),
    ("training.schedule.order", "sideways", "training.schedule.order"),
    ("training.seq_len", -1, "training.seq_len"),
    ("training.weights", "streamed", "training.weights"),
    ("training.unknown", 1, "training.unknown"),
]

BAD_PLANS = [
    *BAD_TRAINING,
    ("model", "llama-99", "model"),
    ("model", "", "model"),
    ("gpu", "rtx-9999", "gpu"),
    ("gpu", {"name": "mine"}, "gpu.memory_bytes"),
    ("gpu", {"name": "a\x00b", "memory_bytes": 2**30}, "gpu"),
    ("gpu_count", 2, "gpu_count"),
    ("memory_limit_bytes", -1, "memory_limit_bytes"),
    ("model", {"path": "/etc"}, "model.path"),
    ("model", {"path": "../../.."}, "model.path"),
    ("model", {"path": "a\x00b"}, "model.path"),
    ("model", {"config": {"model_type": "llama", "num_hidden_layers": 10**6}}, "model.config.num_hidden_layers"),
    ("model", {"config": {"model_type": "no-such-type"}}, "model.config.model_type"),
    ("model", {"config": {"model_type": "llama", "note": "a\x00b"}}, "model.config"),
]


@pytest.mark.parametrize(("path", "value", "field"), BAD_PLANS)
def test_a_bad_plan_request_names_the_field_and_stores_nothing(client, services, path, value, field):
    assert refused(client.post("/v1/plans", json=changed(PLAN, path, value)), field)
    assert stored(services, PlanRow) == 0


BAD_JOBS = [
    *BAD_TRAINING,
    ("training.max_steps", 0, "training.max_steps"),
    ("training.learning_rate", -1, "training.learning_rate"),
    ("model", "llama-99", "model"),
    ("model", "llama-3-8b", "model"),
    ("model", {"path": "/etc/passwd"}, "model.path"),
    ("model", {"config": {"model_type": "llama"}}, "model.config"),
    ("gpu", "rtx-9999", "gpu"),
    ("gpu", {"name": "mine", "memory_bytes": 0}, "gpu.memory_bytes"),
    ("dataset", {"path": "missing.jsonl"}, "dataset.path"),
    ("dataset", {"path": "/etc/passwd"}, "dataset.path"),
    ("dataset", {"path": "a\x00b"}, "dataset.path"),
    ("dataset", {"file_id": "file_missing"}, "dataset.file_id"),
    ("dataset", {"file_id": "a\x00b"}, "dataset.file_id"),
    ("dataset", {}, "dataset"),
    ("plan_id", "plan_missing", "plan_id"),
    ("name", "../escape", "name"),
    ("output", {"name": "../escape"}, "output.name"),
    ("priority", 10**6, "priority"),
]


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(("path", "value", "field"), BAD_JOBS)
def test_a_bad_job_names_the_field_and_stores_nothing(client, services, dataset, path, value, field, dry_run):
    if path == "dataset" and value.get("path") == "missing.jsonl":
        value = {"path": str(dataset.with_name("missing.jsonl"))}
    response = client.post(
        "/v1/jobs",
        json=changed(job_request(dataset), path, value),
        params={"dry_run": dry_run},
        headers={"Idempotency-Key": "bad"},
    )
    assert refused(response, field)
    assert stored(services) == 0
    assert stored(services, IdempotencyRow) == 0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"messages": [', '{"text": "fine"}'], "line 1"),
        (['{"text": "fine"}', "", '{"text": 3}'], "line 3"),
        (['{"text": "fine"}', '{"text": "fine"}', "not json"], "line 3"),
        ([], ""),
    ],
)
def test_a_malformed_dataset_names_the_line(client, services, dataset, tmp_path, lines, message):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    response = client.post("/v1/jobs", json=job_request(dataset) | {"dataset": {"path": str(path)}})
    assert message in refused(response, "dataset.path")
    assert stored(services) == 0


def test_a_malformed_upload_names_the_line_under_file_id(client, dataset):
    upload = client.post("/v1/files", files={"file": ("bad.jsonl", b'{"text": "fine"}\n{\n')}).json()
    response = client.post("/v1/jobs", json=job_request(dataset) | {"dataset": {"file_id": upload["id"]}})
    assert "line 2" in refused(response, "dataset.file_id")


def test_a_symbolic_link_does_not_lead_out_of_the_roots(client, dataset, tmp_path):
    link = tmp_path / "inside.jsonl"
    link.symlink_to("/etc/passwd")
    response = client.post("/v1/jobs", json=job_request(dataset) | {"dataset": {"path": str(link)}})
    assert "outside" in refused(response, "dataset.path")


def test_a_model_folder_whose_files_lead_out_is_refused(client, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to("/etc/hostname")
    response = client.post("/v1/plans", json=PLAN | {"model": {"path": str(folder)}})
    assert "outside" in refused(response, "model.path")


def test_text_that_no_database_can_hold_is_refused(client):
    body = json.dumps(PLAN).replace(f'"{TINY_MODEL}"', '{"config": {"model_type": "llama", "note": "\\ud800"}}')
    response = client.post("/v1/plans", content=body, headers={"content-type": "application/json"})
    assert refused(response, "model.config")


def test_several_bad_fields_are_all_named(client):
    body = PLAN | {"gpu_count": 3, "training": {"seq_len": 0, "schedule": {"num_chunks": 0}}}
    errors = client.post("/v1/plans", json=body).json()["errors"]
    assert {error["field"] for error in errors} == {"gpu_count", "training.seq_len", "training.schedule.num_chunks"}
