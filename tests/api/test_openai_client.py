"""The official `openai` package, as it is, against a live server that needs keys, with real trainings."""

import re
from pathlib import Path

import openai
import pytest
from openai import OpenAI, Stream
from openai.types.fine_tuning import FineTuningJobEvent

from chunkplan.service.access.service import Access
from chunkplan.service.db import Database
from chunkplan.service.kit.clock import SystemClock
from tests.conftest import TINY_MODEL
from tests.support.live import TRAINING
from tests.support.waiting import wait_for

PAGE = Path(__file__).parents[2] / "docs" / "openai.md"
TINY = {"chunkplan": {"gpu": "cpu", "training": {key: TRAINING[key] for key in TRAINING if key != "learning_rate"}}}


@pytest.fixture
def database_url(tmp_path):
    """One engine is enough here: what differs between them is tested in test_fine_tuning."""
    return f"sqlite:///{tmp_path / 'chunkplan.db'}"


@pytest.fixture
def connect(database_url, start_server):
    """The client of a project, with a key of its own."""
    server = start_server()
    database = Database(database_url)

    def connect(project, *scopes):
        access = Access(database, SystemClock())
        _, key = access.create(name="test", project=project, scopes=scopes, expires_at=None)
        return OpenAI(base_url=f"{server.http.base_url}/v1", api_key=key)

    connect.server = server
    yield connect
    database.dispose()


def events_of(client, job):
    """The events of a job as they come, until it has ended."""
    path = f"/fine_tuning/jobs/{job.id}/events/stream"
    return client.get(path, cast_to=FineTuningJobEvent, stream=True, stream_cls=Stream[FineTuningJobEvent])


def wait_for_status(client, job, *statuses):
    def probe():
        found = client.fine_tuning.jobs.retrieve(job.id)
        assert found.status in statuses or found.status in {"queued", "running", "paused"}, found.error
        return found if found.status in statuses else None

    return wait_for(probe, f"{job.id} to be {statuses}", 120)


@pytest.mark.slow
def test_files_and_jobs_from_upload_to_the_next_model(connect, dataset):
    client = connect("maths", "submit")
    jobs = client.fine_tuning.jobs

    file = client.files.create(file=dataset, purpose="fine-tune")
    assert (file.bytes, file.filename, file.status) == (dataset.stat().st_size, "chats.jsonl", "processed")
    assert client.files.wait_for_processing(file.id).id == file.id
    validation = client.files.create(file=("held-out.jsonl", dataset.read_bytes()), purpose="fine-tune")
    assert [each.id for each in client.files.list(order="asc", limit=1)] == [file.id, validation.id], "two pages"
    assert [each.id for each in client.files.list(purpose="fine-tune", limit=10_000)] == [validation.id, file.id]
    assert client.files.list(purpose="batch").data == []
    assert client.files.content(file.id).read() == dataset.read_bytes()

    long = jobs.create(
        model=TINY_MODEL,
        training_file=file.id,
        hyperparameters={"n_epochs": 50, "learning_rate_multiplier": 2},
        metadata={"length": "long"},
        extra_body=TINY,
    )
    wait_for(lambda: [e for e in jobs.list_events(long.id).data if e.type == "metrics"], "the first step")
    assert jobs.pause(long.id).status in {"running", "paused"}
    wait_for_status(client, long, "paused")

    short = jobs.create(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        training_file=file.id,
        validation_file=validation.id,
        suffix="Sums of two",
        seed=7,
        metadata={"length": "short", "team": "a b"},
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 50},
            },
        },
        extra_body=TINY,
    )
    assert (short.object, short.status, short.seed) == ("fine_tuning.job", "queued", 7)
    assert (short.training_file, short.validation_file) == (file.id, validation.id)
    assert short.hyperparameters.model_dump() == {"batch_size": 4, "learning_rate_multiplier": 50, "n_epochs": 1}
    assert short.method.supervised.hyperparameters.batch_size == 4
    assert short.organization_id == "maths"
    assert short.chunkplan["training"]["learning_rate"] == pytest.approx(1e-3)
    assert short.chunkplan["training"]["gradient_accumulation_steps"] == 2
    with pytest.raises(openai.ConflictError, match="trains on this file") as conflict:
        client.files.delete(validation.id)
    assert conflict.value.code == "file_in_use"

    streamed = list(events_of(client, short))
    assert streamed[-1].message == "Job succeeded: completed"
    listed = list(jobs.list_events(short.id, limit=7))
    assert [event.id for event in listed] == [event.id for event in reversed(streamed)], "newest first, over pages"
    steps = [event for event in streamed if event.type == "metrics" and "train_loss" in event.data]
    assert [event.data["step"] for event in steps] == list(range(1, 17)), "64 rows, none held out, 4 per update"
    losses = [event.data["full_valid_loss"] for event in streamed if "full_valid_loss" in (event.data or {})]
    assert losses[-1] < losses[0]
    assert {event.level for event in streamed} <= {"info", "warn"}

    done = jobs.retrieve(short.id)
    assert (done.status, done.error) == ("succeeded", None)
    assert Path(done.fine_tuned_model).name == "smollm2-135m-instruct-chunkft-sums-of-two-v1"
    assert (Path(done.fine_tuned_model) / "model.safetensors").is_file()
    assert done.trained_tokens == sum(event.data["num_tokens"] for event in steps)
    assert done.finished_at >= done.created_at
    checkpoints = list(jobs.checkpoints.list(short.id, limit=1))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [12, 8, 4]
    assert checkpoints[0].fine_tuning_job_id == short.id
    assert checkpoints[0].metrics.train_loss == steps[11].data["train_loss"]

    assert jobs.resume(long.id).status in {"queued", "running"}
    wait_for_status(client, long, "running")
    jobs.cancel(long.id)
    cancelled = wait_for_status(client, long, "cancelled")
    assert cancelled.fine_tuned_model is None

    page = jobs.list(limit=1)
    assert page.has_more
    assert [job.id for job in page] == [short.id, long.id], "the iterator asks for the second page"
    assert [job.id for job in jobs.list(metadata={"length": "short", "team": "a b"})] == [short.id]
    assert [job["id"] for job in connect.server.http.get("/v1/jobs", headers=client.auth_headers).json()["data"]] == [
        short.id,
        long.id,
    ], "one job, two views"

    following = jobs.create(model=done.fine_tuned_model, training_file=file.id, extra_body=TINY)
    assert following.model == done.fine_tuned_model
    jobs.cancel(following.id)
    wait_for_status(client, following, "cancelled")
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)

    with pytest.raises(openai.ConflictError, match="it cannot become paused") as conflict:
        jobs.pause(short.id)
    assert conflict.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.UnprocessableEntityError, match="only 'supervised'") as refused:
        jobs.create(model=TINY_MODEL, training_file=validation.id, method={"type": "dpo"}, extra_body=TINY)
    assert (refused.value.code, refused.value.param) == ("invalid_input", "method.type")
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="there is no job"):
        connect("others", "submit").fine_tuning.jobs.retrieve(short.id)
    with pytest.raises(openai.PermissionDeniedError):
        connect("maths", "read").fine_tuning.jobs.cancel(short.id)
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=client.base_url, api_key="sk-wrong").fine_tuning.jobs.list()


@pytest.mark.slow
def test_the_page_runs_as_it_stands(start_server, dataset, monkeypatch, capsys):
    server = start_server()
    monkeypatch.chdir(dataset.parent)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        code = block.replace("http://127.0.0.1:8321", str(server.http.base_url))
        exec(compile(code, str(PAGE), "exec"), names)
    assert names["job"].status == "succeeded"
    assert names["job"].fine_tuned_model.endswith("smollm2-135m-instruct-chunkft-sums-v1")
    printed = capsys.readouterr().out
    assert "training loss=" in printed
    assert printed.splitlines()[0].startswith("queued plan_")
    names["client"].close()
