"""The main job, end to end: ``make run``.

Prepares a real pretrained model and a real text set, starts the service on a free port with SQLite, and
through HTTP plans a run, submits it, follows it, and compares what was predicted with what was measured. The
exit code is 0 only if the job succeeded, learned, changed every tensor, and stayed where the plan said.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chunkplan.planner.calibration.residuals import STEP
from chunkplan.planner.spec import Plan
from chunkplan.service.cli.client import Client, Unreachable
from chunkplan.service.cli.exits import CommandError
from chunkplan.service.cli.jobs import follow
from chunkplan.service.cli.output import console, duration, mebibytes, number, percent
from chunkplan.service.cli.plan_view import print_plan
from chunkplan.service.cli.residual_view import print_residuals
from chunkplan.service.demo.assets import AssetError, prepare_chats, prepare_model
from chunkplan.service.job_states import JobState

JOB_NAME = "soc-codes"
NUM_CHUNKS = 8
MAX_STEPS = 32
# Chats of this set are 60 to 104 tokens long: every batch is 128 wide, which is what the plan is for.
TRAINING = {
    "method": "chunkft",
    "seq_len": 128,
    "micro_batch_size": 8,
    "precision": "fp32",
    "schedule": {"num_chunks": NUM_CHUNKS, "order": "random", "switch_every": 2, "expansion": "factored"},
}
RATES = {
    "learning_rate": 3e-4,
    "expansion_learning_rate": 2e-4,
    "lr_schedule": "linear",
    "max_steps": MAX_STEPS,
    "checkpoint_every": MAX_STEPS // 2,
}

MIN_LOSS_DROP = 0.10
MAX_ERROR = 0.03
MAX_UNDER = 0.01
_START_SECONDS = 60.0
_STOP_SECONDS = 60.0


def main() -> int:
    """Run the demo; returns the exit code."""
    begin = time.monotonic()
    try:
        holds = _run(Path("var"))
    except (AssetError, CommandError) as error:
        print(f"make run: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make run: interrupted", file=sys.stderr)
        return 1
    console().print(f"\n{'everything held' if holds else 'not everything held'}, {duration(time.monotonic() - begin)}")
    return 0 if holds else 1


def _run(var: Path) -> bool:
    _head("1. Model and data")
    model = prepare_model(var)
    chats = prepare_chats(var)
    console().print(f"{model}\n{chats}")
    with _service(var) as url, Client(url) as client:
        _cancel_unfinished(client)
        _head("2. Plan")
        request = {"model": {"path": str(model)}, "gpu": "cpu", "training": TRAINING}
        plan = client.post("/v1/plans", request)
        print_plan(Plan.model_validate(plan))
        _head("3. Train")
        job = client.post(
            "/v1/jobs",
            {
                **request,
                "name": JOB_NAME,
                "training": {**TRAINING, **RATES},
                "dataset": {"path": str(chats)},
                "plan_id": plan["id"],
            },
        )
        console().print(f"{job['id']} of {plan['id']} at {url}")
        job = follow(client, job["id"], as_json=False)
        _head("4. Predicted against measured")
        return _judge(client, job)


def _cancel_unfinished(client: Client) -> None:
    """An earlier run that was interrupted would be resumed first, as the service promises: nobody waits for
    it now.
    """
    for job in client.pages("/v1/jobs"):
        if job["name"] == JOB_NAME and not JobState(job["state"]).is_final:
            client.post(f"/v1/jobs/{job['id']}/cancel")


def _judge(client: Client, job: dict[str, Any]) -> bool:
    """Print what came of the job; true if all of it is what was promised."""
    residuals = list(client.pages(f"/v1/profiles/{job['profile_id']}/residuals"))
    print_residuals(residuals)
    errors = [item["relative_error"] for item in residuals if item["phase"] == STEP]
    losses = [item["loss"] for item in client.pages(f"/v1/jobs/{job['id']}/metrics", kind="eval")]
    drop = 1 - losses[-1] / losses[0]
    coverage = job["coverage"]
    updated = coverage["num_tensors_updated"] / coverage["num_tensors"]
    artifacts = list(client.pages(f"/v1/jobs/{job['id']}/artifacts"))
    size = sum(item["size_bytes"] for item in artifacts)
    _head("5. What came of it")
    checks = {
        f"all {NUM_CHUNKS} chunks were measured": len(errors) == NUM_CHUNKS,
        f"held-out loss {number(losses[0])} → {number(losses[-1])} ({percent(-drop)})": drop >= MIN_LOSS_DROP,
        f"tensors updated: {coverage['num_tensors_updated']} of {coverage['num_tensors']}": updated == 1.0,
        f"peak within {MAX_ERROR:.0%} on every chunk": max(map(abs, errors), default=1.0) <= MAX_ERROR,
        f"no chunk more than {MAX_UNDER:.0%} above its plan": min(errors, default=-1.0) >= -MAX_UNDER,
        f"model exported: {len(artifacts)} files, {mebibytes(size)}": size > 0,
    }
    for text, holds in checks.items():
        console().print(f"[green]yes[/]  {text}" if holds else f"[bold red]no[/]   {text}")
    return all(checks.values())


@contextmanager
def _service(var: Path) -> Iterator[str]:
    """The service's address; it is stopped when the block ends, however it ends."""
    port = _free_port()
    command = [sys.executable, "-m", "chunkplan.service.cli", "serve", "--port", str(port), "--data-dir", str(var)]
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("CHUNKPLAN_") or name == "CHUNKPLAN_CACHE_DIR"
    }
    # Threads that wait for each other sleep instead of spinning: on a busy machine training would otherwise
    # be several times slower.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | kept
    log = var / "service.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    with Client(url) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise CommandError(f"the service ended with code {process.returncode}; see {log}")
            try:
                client.get("/readyz")
            except Unreachable:
                time.sleep(0.1)
            else:
                return
    raise CommandError(f"the service did not start within {_START_SECONDS:.0f} seconds; see {log}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _head(title: str) -> None:
    console().print(f"\n[bold]{title}[/]\n")


if __name__ == "__main__":
    sys.exit(main())
