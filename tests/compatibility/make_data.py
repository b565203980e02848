"""Makes data.zip with an older version: run it from that version's checkout, ``python make_data.py
FILE.zip``.

It holds a database of a real server (a plan, a job that succeeded, one that waits), and the folder of a run
that was stopped with a checkpoint, with the losses that the same version got when it went on.
"""

import json
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
from pathlib import Path

from tests.api.requests import job_request
from tests.engine.runs import events_of, exit_code, prepare_run, start_worker, wait_for
from tests.support.live import LiveServer
from tests.support.model import write_chats, write_tiny_model

PLAN = {
    "model": "smollm2-135m-instruct",
    "gpu": "rtx-4090",
    "training": {"seq_len": 128, "schedule": {"num_chunks": 8}},
}


def database(folder: Path, out: Path) -> None:
    """A server's database."""
    write_tiny_model(folder / "models" / "smollm2-135m-instruct")
    write_chats(folder / "chats.jsonl", num_rows=32)
    environment = {
        "CHUNKPLAN_DATA_DIR": str(folder / "var"), "CHUNKPLAN_MODELS_DIR": str(folder / "models"),
        "CHUNKPLAN_DATASET_ROOTS": json.dumps([str(folder)]), "CHUNKPLAN_CACHE_DIR": str(folder / "cache"),
        "CHUNKPLAN_DATABASE_URL": f"sqlite:///{folder / 'server.db'}",
    }  # fmt: skip
    server = LiveServer(environment, folder / "log.txt")
    server.wait_until_ready()
    plan = server.post("/v1/plans", PLAN)
    done = server.post("/v1/jobs", job_request(folder / "chats.jsonl", max_steps=8))["id"]
    server.wait_for_state(done, "succeeded")
    running = server.post("/v1/jobs", job_request(folder / "chats.jsonl", max_steps=100_000))["id"]
    server.wait_for_events(running, "step", 1)
    waiting = server.post("/v1/jobs", job_request(folder / "chats.jsonl", max_steps=8))["id"]
    server.post(f"/v1/jobs/{running}/cancel")
    server.wait_for_state(running, "cancelled")
    server.post(f"/v1/jobs/{waiting}/pause")
    server.wait_for_state(waiting, "paused", "succeeded")
    seen = {
        "plan": plan,
        "done": server.get(f"/v1/jobs/{done}"),
        "profile": server.get("/v1/profiles", job_id=done)["data"][0],
        "metrics": server.get(f"/v1/jobs/{done}/metrics")["data"],
        "jobs": [row["id"] for row in server.get("/v1/jobs")["data"]],
    }
    server.close()
    with sqlite3.connect(folder / "server.db") as source, sqlite3.connect(out / "server.db") as target:
        source.backup(target)
        target.execute("VACUUM")
    (out / "seen.json").write_text(json.dumps(seen, indent=1))


def stopped_run(folder: Path, out: Path) -> None:
    """A run's folder, and what became of it."""
    run = prepare_run(folder, max_steps=20, checkpoint_every=4, checkpoints_to_keep=1)
    worker = start_worker(run)
    wait_for(run, 1, worker, "checkpoint")
    worker.send_signal(signal.SIGTERM)
    assert exit_code(worker) == 75
    shutil.copytree(folder / "base", out / "run" / "base")
    shutil.copy(folder / "rows.jsonl", out / "run" / "rows.jsonl")
    shutil.copytree(run, out / "run" / "run")
    assert exit_code(start_worker(run, 2)) == 0
    losses = {event["step"]: event["loss"] for event in events_of(run, 2, "step")}
    (out / "losses.json").write_text(json.dumps(losses))


def main() -> None:
    """Make everything."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as out:
        (Path(work) / "server").mkdir()
        (Path(work) / "worker").mkdir()
        database(Path(work) / "server", Path(out))
        stopped_run(Path(work) / "worker", Path(out))
        shutil.make_archive(sys.argv[1].removesuffix(".zip"), "zip", out)


if __name__ == "__main__":
    main()
