"""The worker as its parent sees it: real subprocesses, signals, exit codes, events, artifacts."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chunkplan.engine.worker import run_attempt
from tests.support.events import collector
from tests.support.runs import (
    NUM_CHUNKS,
    NUM_STEPS,
    ROOT,
    events_of,
    exit_code,
    prepare_run,
    start_worker,
    wait_for,
    worker_command,
    worker_env,
    write_job,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    run = prepare_run(tmp_path_factory.mktemp("uninterrupted"))
    assert exit_code(start_worker(run)) == 0, (run / "attempts/1/log.txt").read_text()
    return run


def exported(run):
    return load_file(run / "artifacts" / "tuned" / "model.safetensors")


def assert_same_weights(run, other):
    expected = exported(other)
    actual = exported(run)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_events_are_those_the_protocol_names(uninterrupted):
    events = events_of(uninterrupted)
    assert [event["type"] for event in events[:3]] == ["loading", "started", "eval"]
    assert events[-1]["type"] == "finished"
    assert events[-1]["reason"] == "completed"
    started = events[1]
    assert started["pid"] > 0
    assert (started["num_chunks"], started["total_steps"], started["resumed_step"]) == (NUM_CHUNKS, NUM_STEPS, 0)
    assert started["dataset"]["num_train_rows"] + started["dataset"]["num_eval_rows"] == 24
    assert started["dataset"]["num_packed_sequences"] is None
    assert not (uninterrupted / "tokens").exists()
    steps = events_of(uninterrupted, kind="step")
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    assert [step["chunk_index"] for step in steps] == [3, 2, 1, 0] * 10
    assert [step["visit"] for step in steps] == [cycle for cycle in range(10) for _ in range(4)]
    assert [sample["phase"] for sample in steps[1]["samples"]] == ["load", "forward", "backward", "optimizer"]
    assert all(sample["allocated_bytes"] > 0 for step in steps for sample in step["samples"])
    # Ten cycles, linear: every chunk sees the same rates, and one more cycle would be at zero.
    assert [step["learning_rate"] for step in steps] == pytest.approx(
        [1e-3 - 1e-4 * (i // 4) for i in range(NUM_STEPS)]
    )
    evaluations = events_of(uninterrupted, kind="eval")
    assert [evaluation["step"] for evaluation in evaluations] == [0, NUM_STEPS]
    assert evaluations[1]["loss"] < evaluations[0]["loss"]
    assert [checkpoint["step"] for checkpoint in events_of(uninterrupted, kind="checkpoint")] == list(
        range(6, NUM_STEPS, 6)
    )


def test_measured_peaks_of_a_chunk_are_the_same_in_every_cycle(uninterrupted):
    cycles = [[] for _ in range(NUM_STEPS // NUM_CHUNKS)]
    for step in events_of(uninterrupted, kind="step"):
        peaks = [(sample["phase"], sample["allocated_bytes"]) for sample in step["samples"]]
        cycles[step["visit"]].append(peaks)
    steady = cycles[1:]  # the model is loaded in the first
    assert all(cycle == steady[0] for cycle in steady)


def test_one_cycle_updates_every_tensor(uninterrupted):
    (coverage,) = events_of(uninterrupted, kind="coverage")
    assert coverage["num_tensors"] == coverage["num_tensors_updated"] == 20
    assert coverage["not_updated"] == []


def test_the_exported_folder_loads_in_transformers_and_speaks(uninterrupted):
    folder = uninterrupted / "artifacts" / "tuned"
    names = {event["name"] for event in events_of(uninterrupted, kind="artifact")}
    assert names == {path.name for path in folder.iterdir()} >= {"model.safetensors", "README.md"}
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    inputs = tokenizer("the title", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]


def test_kill_9_then_sigterm_then_the_end_gives_the_weights_of_an_uninterrupted_run(tmp_path, uninterrupted):
    run = prepare_run(tmp_path)
    killed = start_worker(run, 1)
    wait_for(run, 1, killed, "checkpoint")
    killed.kill()
    assert exit_code(killed) == -signal.SIGKILL
    (run / "checkpoints" / ".step-00000099.partial").mkdir()  # what a kill in the middle of saving leaves

    stopped = start_worker(run, 2)
    wait_for(run, 2, stopped, "step", count=3)
    stopped.send_signal(signal.SIGTERM)
    assert exit_code(stopped) == 75
    last = events_of(run, 2)[-1]
    assert (last["type"], last["reason"]) == ("finished", "stopped")
    assert events_of(run, 2, "checkpoint")[-1]["step"] == last["step"] < NUM_STEPS

    assert exit_code(start_worker(run, 3)) == 0
    assert events_of(run, 3, "started")[0]["resumed_step"] == last["step"]
    assert_same_weights(run, uninterrupted)
    for attempt in (2, 3):
        resumed = events_of(run, attempt, "started")[0]["resumed_step"]
        first = events_of(run, attempt, "step")[0]
        assert first["step"] == resumed + 1 > 6
        assert first["chunk_index"] == 3 - resumed % 4
    losses = {event["step"]: event["loss"] for attempt in (1, 2, 3) for event in events_of(run, attempt, "step")}
    assert losses == {event["step"]: event["loss"] for event in events_of(uninterrupted, kind="step")}
    assert all(path.name.startswith("step-") for path in (run / "checkpoints").iterdir())


def test_a_worker_whose_parent_is_killed_checkpoints_and_stops(tmp_path):
    run = prepare_run(tmp_path, max_steps=100_000)
    script = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
    parent = subprocess.Popen([sys.executable, "-c", script, *worker_command(run, 1)], cwd=ROOT, env=worker_env())
    wait_for(run, 1, parent, "step")
    worker = psutil.Process(events_of(run, kind="started")[0]["pid"])
    assert worker.ppid() == parent.pid
    parent.kill()
    parent.wait()
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    assert events_of(run)[-1]["reason"] == "stopped"
    assert events_of(run, kind="checkpoint")[-1]["step"] == events_of(run)[-1]["step"]


def test_a_death_that_the_kernel_tells_twice_is_one_wish_to_stop(tmp_path):
    """It tells of each of the parent's threads that dies while the worker is its child: of a server's,
    several."""
    run = prepare_run(tmp_path, max_steps=100_000)
    script = (
        "import subprocess, sys, threading\n"
        "children = []\n"
        "def start():\n"
        "    children.append(subprocess.Popen(sys.argv[1:]))\n"
        "    print(children[0].pid, flush=True)\n"
        "    sys.stdin.readline()\n"
        "thread = threading.Thread(target=start)\n"
        "thread.start()\n"
        "thread.join()\n"
        "print('the thread is gone', flush=True)\n"
        "children[0].wait()"
    )
    command = [sys.executable, "-c", script, *worker_command(run, 1)]
    with subprocess.Popen(
        command, cwd=ROOT, env=worker_env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        status = Path(f"/proc/{worker.pid}/status")
        until(worker, lambda: int(re.search(r"SigCgt:\t(\w+)", status.read_text())[1], 16) & 1 << signal.SIGTERM - 1)
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert parent.stdout.readline()
        until(worker, lambda: events_of(run, kind="loading"))
        parent.kill()
    psutil.wait_procs([worker], timeout=60)
    assert events_of(run)[-1]["reason"] == "stopped"


def until(process, condition):
    """Block until something holds; fails when the process ends before."""
    while not condition():
        assert process.is_running()
        assert process.status() != psutil.STATUS_ZOMBIE
        os.sched_yield()


def test_one_sigterm_after_the_parents_death_still_checkpoints(tmp_path):
    run = prepare_run(tmp_path, max_steps=100_000)
    worker = start_worker(run)
    wait_for(run, 1, worker, "started")
    worker.send_signal(signal.SIGSTOP)  # so that both wishes are there before an update can end
    os.kill(worker.pid, signal.SIGHUP)
    worker.send_signal(signal.SIGTERM)
    worker.send_signal(signal.SIGCONT)
    assert exit_code(worker) == 75, "a death and one wish: checkpoint and stop"
    assert events_of(run)[-1]["reason"] == "stopped"


def test_a_second_trainer_on_the_device_leaves_at_once(tmp_path):
    run, lock = prepare_run(tmp_path, max_steps=1), tmp_path / "locks" / "cpu.lock"
    lock.parent.mkdir()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert exit_code(start_worker(run, 1, "--lock-file", str(lock))) == 76
    assert events_of(run) == []


def test_malformed_data_names_the_field_and_the_line(tmp_path):
    run = prepare_run(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n{"text": "cut off\n')
    assert exit_code(start_worker(run)) == 1
    event = events_of(run)[-1]
    assert (event["type"], event["reason"], event["field"]) == ("failed", "input", "dataset.path")
    assert "line 2" in event["detail"]


def failure(run):
    """The last event of an attempt that fails, run in this process."""
    events = []
    with pytest.raises(Exception):  # noqa: B017 - the event says which
        run_attempt(run, collector(events), lambda: False)
    json.dumps(events, allow_nan=False)
    assert events[-1]["type"] == "failed"
    assert "\n" not in events[-1]["detail"]
    return events[-1]


def test_a_folder_without_weights_is_named(tmp_path):
    run = prepare_run(tmp_path)
    (tmp_path / "base" / "model.safetensors").unlink()
    event = failure(run)
    assert (event["reason"], event["field"]) == ("input", "model")
    assert "safetensors" in event["detail"]


def test_a_job_file_with_an_unknown_field_is_refused_by_name(tmp_path):
    event = failure(prepare_run(tmp_path, optimiser="adamw"))
    assert (event["reason"], event["field"]) == ("input", "training.optimiser")


def test_more_chunks_than_rows_is_refused_by_name(tmp_path):
    event = failure(prepare_run(tmp_path, schedule={"num_chunks": 999_999}))
    assert (event["reason"], event["field"]) == ("input", "training.schedule.num_chunks")


def test_weights_that_blow_up_stop_the_run_as_diverged(tmp_path):
    run = prepare_run(tmp_path, learning_rate=10.0, schedule={"num_chunks": 1})
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for name in [name for name in weights if "proj" in name]:
        weights[name] *= 1e25
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert failure(run)["reason"] == "diverged"


def test_a_run_refuses_to_go_on_with_another_training_spec(tmp_path, uninterrupted):
    job = json.loads((uninterrupted / "job.json").read_text())
    run = write_job(tmp_path / "run", job["model_path"], job["dataset_path"], learning_rate=5e-4)
    shutil.copytree(uninterrupted / "checkpoints", run / "checkpoints")
    assert "another model, data set or training spec" in failure(run)["detail"]
