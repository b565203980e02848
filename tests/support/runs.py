"""Real runs of ``python -m chunkplan.engine.worker`` on a tiny model folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[2]
NUM_CHUNKS = 4
NUM_STEPS = 40


def prepare_run(folder, rows=24, **training):
    """A run folder with a model, data and job.json; the model is random but the same every time."""
    import torch

    torch.manual_seed(0)
    model, data = folder / "base", folder / "rows.jsonl"
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    data.write_text(
        "".join(json.dumps({"text": f"the title {i} of a metal worker is welder"}) + "\n" for i in range(rows))
    )
    return write_job(folder / "run", model, data, **training)


def write_job(run_dir, model, data, **training):
    """Write job.json of a run; returns the run's folder."""
    schedule = {"num_chunks": NUM_CHUNKS, **training.pop("schedule", {})}
    settings = {
        "seq_len": 64,
        "precision": "fp32",
        "learning_rate": 1e-3,
        "max_steps": NUM_STEPS,
        "checkpoint_every": 6,
    }
    run_dir.mkdir(parents=True)
    job = {
        "job_id": "job_1",
        "name": "tiny",
        "model_path": str(model),
        "dataset_path": str(data),
        "eval_fraction": 0.1,
        "output_name": "tuned",
        "training": {**settings, "schedule": schedule, **training},
    }
    (run_dir / "job.json").write_text(json.dumps(job))
    return run_dir


def start_worker(run_dir, attempt=1, *arguments):
    """A running worker; its output goes to a file next to its events."""
    folder = run_dir / "attempts" / str(attempt)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(
            worker_command(run_dir, attempt, *arguments), cwd=ROOT, stdout=log, stderr=log, env=worker_env()
        )


def worker_command(run_dir, attempt, *arguments):
    """Command line of a worker."""
    return [
        sys.executable,
        "-m",
        "chunkplan.engine.worker",
        "--run-dir",
        str(run_dir),
        "--attempt",
        str(attempt),
        *arguments,
    ]


def worker_env():
    """One thread, so that sums do not depend on who else is running."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}


def events_of(run_dir, attempt=1, kind=None):
    """The attempt's complete events, or those of one kind."""
    path = run_dir / "attempts" / str(attempt) / "events.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    events = [json.loads(line) for line in lines]
    return [event for event in events if kind is None or event["type"] == kind]


def wait_for(run_dir, attempt, process, kind, count=1):
    """Block until the worker has reported ``count`` events of a kind; fails when it ends before."""
    while len(found := events_of(run_dir, attempt, kind)) < count:
        assert process.poll() is None, (run_dir / "attempts" / str(attempt) / "log.txt").read_text()
        os.sched_yield()
    return found


def exit_code(process):
    """Wait for the end."""
    return process.wait(timeout=120)
