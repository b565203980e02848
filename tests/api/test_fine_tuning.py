"""OpenAI's view of jobs: what is said how, and what is refused by which name."""

import json

import pytest

from chunkplan.service.db.tables import JobRow
from chunkplan.service.fine_tuning.requests import FineTuningRequest, job_request
from chunkplan.service.job_states import JobState
from tests.conftest import TINY_MODEL
from tests.support.live import TRAINING
from tests.support.requests import job_request as native_request

JOBS = "/v1/fine_tuning/jobs"
SMALL = {"training": {**TRAINING, "max_steps": 8}}
del SMALL["training"]["learning_rate"]


@pytest.fixture
def file(client, dataset):
    return client.post("/v1/files", files={"file": ("chats.jsonl", dataset.read_bytes())}).json()


@pytest.fixture
def create(client, file):
    def create(headers=None, **fields):
        body = {"model": TINY_MODEL, "training_file": file["id"], "chunkplan": SMALL} | fields
        return client.post(JOBS, json=body, headers=headers)

    return create


def translated(**fields):
    return job_request(FineTuningRequest.model_validate({"model": "gpt2", "training_file": "file_1"} | fields))


def test_a_plain_request_is_a_job_with_every_default():
    request = translated(method={"type": "supervised"}, hyperparameters={"n_epochs": "auto", "batch_size": "auto"})
    assert request == native(dataset={"file_id": "file_1"})


def native(**fields):
    return type(translated()).model_validate({"model": "gpt2"} | fields)


def test_every_word_of_theirs_has_one_of_ours():
    request = translated(
        model="./models/mine",
        validation_file="file_2",
        suffix="one two",
        seed=5,
        metadata={"a": "b"},
        hyperparameters={"n_epochs": 3, "batch_size": 12, "learning_rate_multiplier": 0.5},
        chunkplan={"training": {"micro_batch_size": 4, "method": "lora"}, "priority": 2, "output": {"merge": True}},
    )
    assert request == native(
        model={"path": "./models/mine"},
        training={
            "method": "lora",
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 3,
            "epochs": 3,
            "learning_rate": 1e-5,
            "seed": 5,
        },
        dataset={"file_id": "file_1", "validation_file_id": "file_2"},
        output={"merge": True, "suffix": "one two"},
        priority=2,
        metadata={"a": "b"},
    )


REFUSED = [
    ({"method": {"type": "dpo", "dpo": {}}}, "method.type", "only 'supervised'"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "not reported"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "greater than or equal to 1"),
    ({"hyperparameters": {"batch_size": "many"}}, "hyperparameters.batch_size", "integer"),
    ({"hyperparameters": {"beta": 0.1}}, "hyperparameters.beta", "not permitted"),
    ({"hyperparameters": {"learning_rate_multiplier": 1e9}}, "hyperparameters.learning_rate_multiplier", "above 10"),
    ({"hyperparameters": {"n_epochs": 2}}, "hyperparameters.n_epochs", "same as chunkplan.training.max_steps"),
    (
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 3}}}},
        "method.supervised.hyperparameters.batch_size",
        "multiple of chunkplan.training.micro_batch_size, which is 2",
    ),
    (
        {"hyperparameters": {}, "method": {"type": "supervised", "supervised": {"hyperparameters": {}}}},
        "hyperparameters",
        "give them once",
    ),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"seed": 3, "chunkplan": {"training": {"seed": 3}}}, "seed", "same as chunkplan.training.seed"),
    ({"suffix": "../up"}, "suffix", "match pattern"),
    ({"suffix": "a", "chunkplan": {"output": {"name": "b"}}}, "suffix", "same as chunkplan.output.name"),
    ({"chunkplan": {"output": {"name": "b", "suffix": "c"}}}, "chunkplan.output", "not both"),
    ({"chunkplan": {"output": {"merge": True}}}, "chunkplan", "only for training.method 'lora'"),
    ({"metadata": {'a"b': "c"}}, 'metadata.a"b.[key]', "match pattern"),
    ({"model": "gpt-4o-mini"}, "model", "gpt-4o-mini"),
    ({"model": "/etc"}, "model", "outside the folders"),
    ({"training_file": "file-abc123"}, "training_file", "there is no file"),
    ({"validation_file": "file_missing"}, "validation_file", "there is no file"),
    ({"chunkplan": {"training": {"seq_len": 0}}}, "chunkplan.training.seq_len", "greater than or equal to 1"),
    ({"chunkplan": {"gpu": "rtx-9999"}}, "chunkplan.gpu", "rtx-9999"),
    ({"chunkplan": {"lr": 1}}, "chunkplan.lr", "not permitted"),
    ({"n_epochs": 3}, "n_epochs", "not permitted"),
]


def test_what_cannot_be_done_is_refused_by_its_name(client, create):
    for fields, field, message in REFUSED:
        response = create(**fields)
        assert response.status_code == 422, (fields, response.text)
        problem = response.json()
        assert problem["errors"][0]["field"] == field
        assert message in problem["errors"][0]["message"], fields
        assert problem["error"] == {
            "message": problem["detail"],
            "type": "invalid_request_error",
            "param": field,
            "code": "invalid_input",
        }
    assert client.get(JOBS).json()["data"] == []


def test_bad_rows_name_the_file_that_has_them(client, create):
    bad = client.post("/v1/files", files={"file": ("bad.jsonl", b'{"text": 1}\n')}).json()["id"]
    for name in ("training_file", "validation_file"):
        (error,) = create(**{name: bad}).json()["errors"]
        assert error["field"] == name
        assert "line 1" in error["message"]


def test_what_does_not_fit_is_409_and_not_to_be_repeated(create):
    gpu = {"name": "tiny-cpu", "kind": "cpu", "memory_bytes": 1 << 20}
    response = create(chunkplan=SMALL | {"gpu": gpu})
    assert response.status_code == 409, response.text
    assert response.headers["x-should-retry"] == "false"
    assert response.json()["error"]["code"] == "does_not_fit"
    assert response.json()["predicted_bytes"] > response.json()["available_bytes"]


def test_a_job_is_one_job_in_both_views(client, create, dataset, clock):
    created = create(metadata={"team": "maths"}).json()
    clock.advance(seconds=1)
    other = client.post("/v1/jobs", json=native_request(dataset)).json()
    assert created["chunkplan"] == client.get(f"/v1/jobs/{created['id']}").json()
    assert client.get(f"{JOBS}/{created['id']}").json() == created
    listed = client.get(JOBS).json()["data"]
    assert [(job["id"], job["training_file"]) for job in listed] == [
        (other["id"], str(dataset)),
        (created["id"], created["training_file"]),
    ]
    assert [job["hyperparameters"]["learning_rate_multiplier"] for job in listed] == [50, 1]
    assert client.post(f"{JOBS}/{created['id']}/pause").json()["status"] == "paused"
    assert client.get(f"/v1/jobs/{created['id']}").json()["state"] == "paused"
    assert client.post(f"{JOBS}/{created['id']}/resume").json()["status"] == "queued"
    assert client.post(f"/v1/jobs/{created['id']}/cancel").status_code == 202
    assert client.get(f"{JOBS}/{created['id']}").json()["status"] == "cancelled"
    messages = [event["message"] for event in client.get(f"{JOBS}/{created['id']}/events").json()["data"]]
    assert messages == ["Job cancelled: user", "Job queued: user", "Job paused: user", "Job queued: submitted"]


def test_an_idempotency_key_makes_one_job(client, create):
    first = create(headers={"Idempotency-Key": "k"})
    again = create(headers={"Idempotency-Key": "k"})
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["idempotency-replayed"] == "true"
    assert first.headers["location"] == f"{JOBS}/{first.json()['id']}"
    assert create(headers={"Idempotency-Key": "k"}, seed=1).json()["code"] == "idempotency_key_reused"
    assert len(client.get(JOBS).json()["data"]) == 1


def test_jobs_are_found_by_their_metadata(client, create, clock):
    keys = ["a", "a.b c", "[0]", "{x}", "$'%_"]
    ids = []
    for key in keys:
        clock.advance(seconds=1)
        ids.append(create(metadata={key: "é'\"", "all": ""}).json()["id"])
    create()
    for key, job_id in zip(keys, ids, strict=True):
        found = client.get(JOBS, params={f"metadata[{key}]": "é'\"", "metadata[all]": ""}).json()["data"]
        assert [job["id"] for job in found] == [job_id], key
    assert client.get(JOBS, params={"metadata[a]": "other"}).json()["data"] == []
    pages = client.get(JOBS, params={"metadata[all]": "", "limit": 2}).json()
    assert ([job["id"] for job in pages["data"]], pages["has_more"]) == ([ids[4], ids[3]], True)
    for name in ("metadata", "metadata[", 'metadata[a"b]', "metadata[]", "metadata[a\\]"):
        response = client.get(JOBS, params={name: "x"})
        assert (response.status_code, response.json()["error"]["param"]) == (422, "metadata"), name


def test_states_of_every_kind_have_a_status(client, create, services):
    job_id = create().json()["id"]
    statuses = {}
    for state in JobState:
        with services.database.write() as session:
            row = session.get(JobRow, job_id)
            row.state, row.detail, row.eta_seconds = state, "because", 60.0
        shown = client.get(f"{JOBS}/{job_id}").json()
        statuses[state.value] = shown["status"]
        assert (shown["error"] is not None) is (shown["status"] == "failed")
        assert (shown["estimated_finish"] == shown["created_at"] + 60) is (state is JobState.RUNNING)
        assert (shown["fine_tuned_model"] is not None) is (state is JobState.SUCCEEDED)
    assert statuses == {
        "queued": "queued",
        "starting": "running",
        "running": "running",
        "pausing": "running",
        "paused": "paused",
        "cancelling": "running",
        "succeeded": "succeeded",
        "failed": "failed",
        "cancelled": "cancelled",
        "rejected": "failed",
    }


def test_uploads_that_should_expire_are_refused(client):
    form = {"purpose": "fine-tune", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    response = client.post("/v1/files", files={"file": ("a.jsonl", b'{"text": "a"}\n')}, data=form)
    assert response.json()["error"]["param"] == "expires_after"
    assert client.get("/v1/files").json()["data"] == []


def test_files_of_others_are_unknown(client, services, file, dataset):
    def key(project):
        _, text = services.access.create(name="test", project=project, scopes=("submit",), expires_at=None)
        return {"Authorization": f"Bearer {text}"}

    own, mine = key("beta"), client.post
    body = {"model": TINY_MODEL, "chunkplan": SMALL}
    uploaded = mine("/v1/files", files={"file": ("c.jsonl", dataset.read_bytes())}, headers=own).json()["id"]
    for fields in ({"training_file": file["id"]}, {"training_file": uploaded, "validation_file": file["id"]}):
        problem = mine(JOBS, json=body | fields, headers=own).json()
        assert problem["errors"][0]["message"] == f"there is no file {file['id']!r}"
    assert json.dumps(client.get(JOBS, headers=own).json()["data"]) == "[]"
