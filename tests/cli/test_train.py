"""``chunkplan train``: a job file, no server."""

import json
import signal
from dataclasses import replace

import pytest

from chunkplan.service.cli.local_run import prepare
from chunkplan.service.cli.requests import read_job_file
from tests.support.waiting import wait_for

MODEL = "smollm2-135m-instruct"


@pytest.fixture
def job_file(tmp_path, dataset):
    def write(**changes):
        job = {
            "name": "sums",
            "model": MODEL,
            "training": {
                "seq_len": 64,
                "micro_batch_size": 2,
                "precision": "fp32",
                "learning_rate": 1e-2,
                "max_steps": 8,
                "schedule": {"num_chunks": 4},
            },
            "dataset": {"path": str(dataset), "eval_fraction": 0.1},
        }
        for name, value in changes.items():
            is_part = isinstance(value, dict) and isinstance(job.get(name), dict)
            job[name] = {**job[name], **value} if is_part else value
        path = tmp_path / "job.json"
        path.write_text(json.dumps(job))
        return path

    return write


def test_a_job_is_planned_trained_and_compared(chunkplan, in_process, job_file, tmp_path):
    done = chunkplan("train", job_file())
    assert done.returncode == 0, done.stderr
    assert "started: 8 updates over 4 chunks" in done.stdout
    assert "held-out loss" in done.stdout
    assert "Peak memory by chunk" in done.stdout
    assert "tensors updated: 38 of 38" in done.stdout
    assert "note: 8 updates over 4 chunks change each parameter only about 2 times" in done.stdout
    run_dir = tmp_path / "var" / "runs" / "sums"
    (exported,) = (run_dir / "artifacts").iterdir()
    assert exported.name == "smollm2-135m-instruct-chunkft-chats-v1"
    card = (exported / "README.md").read_text()
    assert 'base_model: "HuggingFaceTB/SmolLM2-135M-Instruct"' in card
    assert "| data file | chats.jsonl |" in card
    assert "| predicted peak memory | " in card
    assert not (run_dir / "checkpoints").exists()
    again = in_process("train", job_file())
    assert again.returncode == 2
    assert "run_dir: this job has finished in" in again.stderr
    other = in_process("train", job_file(training={"max_steps": 9}))
    assert other.returncode == 2
    assert "holds another job" in other.stderr


def test_an_output_is_named_after_its_parts_and_keeps_its_name(chunkplan, job_file, tmp_path, monkeypatch):
    for name, value in chunkplan.environment.items():
        if name.startswith("CHUNKPLAN_"):
            monkeypatch.setenv(name, value)

    def prepared(planned_bytes=None, **changes):
        run = prepare(read_job_file(job_file(**changes)), None, None)
        assert run.spec.predicted_peak_bytes == run.plan.peak.allocated_bytes
        if planned_bytes is not None:
            run = replace(run, spec=run.spec.model_copy(update={"predicted_peak_bytes": planned_bytes}))
        run.write()
        return run.spec.output_name

    assert prepared(planned_bytes=1) == "smollm2-135m-instruct-chunkft-chats-v1"  # by another version's planner
    assert prepared(name="again") == "smollm2-135m-instruct-chunkft-chats-v2"
    assert prepared() == "smollm2-135m-instruct-chunkft-chats-v1"  # the same job, to be resumed
    lora = {"method": "lora", "schedule": {}}
    assert prepared(name="adapter", training=lora) == "smollm2-135m-instruct-lora-chats-v1"
    assert prepared(name="mine", output={"name": "welders"}) == "welders"
    assert prepared(name="part", output={"suffix": "first"}) == "smollm2-135m-instruct-chunkft-first-v1"


def test_json_carries_the_outcome(chunkplan, job_file, tmp_path):
    done = chunkplan("train", job_file(), "--run-dir", tmp_path / "run", "--json")
    outcome = json.loads(done.stdout)
    assert outcome["evaluations"][-1]["loss"] < outcome["evaluations"][0]["loss"]
    assert outcome["coverage"]["not_updated"] == []
    steps = [item for item in outcome["residuals"] if item["phase"] == "step"]
    assert [step["chunk_index"] for step in steps] == [0, 1, 2, 3]


def test_an_interrupted_run_is_resumed_by_the_same_command(chunkplan, job_file, tmp_path):
    path = job_file(training={"max_steps": 400, "checkpoint_every": 400})
    events = tmp_path / "var" / "runs" / "sums" / "attempts" / "1" / "events.jsonl"
    process = chunkplan.start("train", path)
    wait_for(lambda: events.exists() and '"type": "step"' in events.read_text(), "the first update", 90)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "chunkplan: stopped after update " in errors
    resumed = chunkplan("train", path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after update" in resumed.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gpt2"}, "model: the weights of 'gpt2' are not in "),
        ({"gpu": "rtx-4090"}, "gpu: no device of kind cuda here to run 'rtx-4090' on"),
        ({"gpu": {"name": "x"}}, "gpu.memory_bytes: Field required"),
        ({"dataset": {"path": "nowhere.jsonl"}}, "dataset.path: "),
        ({"dataset": {"path": None, "file_id": "file_x"}}, "dataset.file_id: uploads belong to a service"),
        ({"dataset": {"validation_path": "nowhere.jsonl", "eval_fraction": 0}}, "dataset.validation_path: "),
        ({"model": {"path": "/etc"}}, "model.path: /etc is not a model folder: it has no config.json"),
        ({"model": {"path": "~nobody-of-that-name/model"}}, "model.path: not a path that can be followed: "),
        ({"dataset": {"path": "rows\0.jsonl"}}, "dataset.path: "),
        ({"plan_id": "plan_0"}, "plan_id: plans are kept by a service; leave it out"),
        ({"training": {"colour": "red"}}, "training.colour: "),
        (
            {"output": {"merge": True}},
            "request: output.merge adds adapters to the weights: only for training.method 'l",
        ),
    ],
)
def test_bad_jobs_are_refused_by_field(in_process, job_file, changes, message):
    done = in_process("train", job_file(**changes))
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"chunkplan: {message}")
    assert "Traceback" not in done.stderr


def test_what_only_the_trainer_can_see_is_refused_by_field_too(chunkplan, job_file):
    done = chunkplan("train", job_file(training={"seq_len": 8}))
    assert done.returncode == 2
    assert done.stderr == "chunkplan: dataset.path: none of the 64 rows has a token to train within seq_len 8\n"


def test_a_file_that_is_no_job(in_process, tmp_path):
    (tmp_path / "bad.json").write_text("{")
    assert "chunkplan: file: " in in_process("train", tmp_path / "bad.json").stderr
    assert in_process("train", tmp_path / "missing.json").returncode == 2
