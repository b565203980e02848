"""How fast the dashboards answer over a full database: 10 000 jobs, 5 million samples. SQLite and Postgres.

Run: ``python -m benchmarks.dashboard [--only sqlite|postgres] [--jobs N] [--samples N] [--output FILE]``.
Needs the programs of Postgres and about 4 GB in the temporary folder, which are given back. Every answer is a
request to the whole application, in this process; other load on the machine shows in the 95th percentile.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, insert, text, update
from starlette.testclient import TestClient

from chunkplan.service.app import create_app
from chunkplan.service.db import Database, upgrade
from chunkplan.service.db.tables import (
    AttemptRow,
    JobDayRow,
    JobRow,
    PlanRow,
    PlanUseRow,
    ProfilePhaseRow,
    ProfileRow,
)
from chunkplan.service.job_states import JobState, Reason
from chunkplan.service.jobs.admission import turn_at
from chunkplan.service.kit.ids import new_id
from chunkplan.service.operation.logs import configure_logging
from chunkplan.service.operation.retention import Retention
from chunkplan.service.plans.planning_process import PlannerProcess
from chunkplan.service.profiles.percentiles import bucket_of
from chunkplan.service.settings import Settings
from tests.support.clock import FixedClock
from tests.support.postgres import PostgresCluster

TARGET_MILLISECONDS = 100.0
PHASES = ("forward", "backward", "optimizer", "step")
NUM_DAYS, NUM_CHUNKS, NUM_REPEATS = 90, 32, 40
END = datetime(2026, 1, 1, tzinfo=UTC)
PROJECTS = ("default", "vision", "speech", "search")
MODELS = tuple(f"model-{number}" for number in range(12))
GPUS = ("rtx-4090", "a100-80gb", "h100-80gb", "rtx-3060-12gb")
RUN_SPEC = {"output_name": "bench", "training": {"max_steps": None, "note": "x" * 2000}}

QUERIES = {
    "summary": "/v1/dashboard/summary",
    "accuracy": "/v1/dashboard/accuracy",
    "accuracy by model, gpu, phase": "/v1/dashboard/accuracy?by=model&by=gpu&by=phase",
    "accuracy by day": "/v1/dashboard/accuracy?by=day",
    "accuracy by day, 30 days": "/v1/dashboard/accuracy?by=day&days=30",
    "accuracy by day and phase of one model": "/v1/dashboard/accuracy?by=day&by=phase&model=model-3",
    "usage, 30 days": "/v1/dashboard/usage",
    "usage, 366 days": "/v1/dashboard/usage?days=366",
}
OTHERS = {"jobs": "/v1/jobs?limit=100", "profiles": "/v1/profiles?limit=100", "metrics": "/metrics"}
"""What is asked for beside the dashboards; no target here."""


def fill(database: Database, num_jobs: int, num_samples: int) -> None:
    """Rows as jobs of the last 90 days would have left them; not one by one."""
    generator = random.Random(0)
    num_run = sum(_state(number, num_jobs) is not JobState.QUEUED for number in range(num_jobs))
    num_steps = math.ceil(num_samples / num_run / (len(PHASES) - 1))
    with database.engine.begin() as connection:
        sqlite = connection.dialect.name == "sqlite"
        if not sqlite:  # the rows refer to each other by construction; checking millions of them takes minutes
            connection.execute(text("SET LOCAL session_replication_role = replica"))
        for table, rows in _rows(generator, num_jobs, num_steps).items():
            for start in range(0, len(rows), 500):
                connection.execute(insert(table), rows[start : start + 500])
        _steps_and_samples(connection, num_steps)
        if not sqlite:
            connection.execute(text("ANALYZE"))
    database.refresh_statistics()


def _rows(generator: random.Random, num_jobs: int, num_steps: int) -> dict[Any, list[dict[str, Any]]]:
    plans: list[dict[str, Any]] = []
    uses, jobs, attempts, profiles, phases, days = [], [], [], [], [], []
    for model in MODELS:
        for gpu in GPUS:
            plan = {"id": f"plan_{len(plans)}", "planner_version": "1", "model": model, "gpu": gpu, "method": "chunkft"}
            plan |= {"fits": True, "upper_bytes": 20 << 30, "capacity_bytes": 24 << 30, "step_seconds": 0.5}
            plans.append(plan | {"plan": {"chunks": ["x" * 200] * NUM_CHUNKS}, "created_at": END})
            uses += [{"project": name, "plan_id": plan["id"], "created_at": END} for name in PROJECTS]
    for number in range(num_jobs):
        created = END - timedelta(days=NUM_DAYS * (1 - number / num_jobs), seconds=1)
        plan = generator.choice(plans)
        state = _state(number, num_jobs)
        ended = state.is_final
        job = {"id": new_id("job", created), "project": generator.choices(PROJECTS, (7, 1, 1, 1))[0], "name": "bench"}
        job |= {"state": state, "reason": Reason.COMPLETED, "model": plan["model"], "gpu": plan["gpu"]}
        job |= {"device": "cuda", "priority": number % 5, "plan_id": plan["id"], "created_at": created}
        job |= {"turn_at": turn_at(created, number % 5, 3600.0), "upper_bytes": plan["upper_bytes"]}
        job |= {"request": {"note": "x" * 1000}, "run_spec": RUN_SPEC, "num_attempts": 1, "last_event": 1}
        job |= {"step": num_steps, "num_failures": 0, "not_before": created, "started_at": created}
        job |= {"finished_at": created + timedelta(minutes=30) if ended else None, "coverage": None}
        jobs.append(job)
        if state is JobState.QUEUED:
            continue
        attempt = {"id": new_id("att", created), "job_id": job["id"], "number": 1, "token": "0", "owner": "bench"}
        attempt |= {"host": "bench", "upper_bytes": plan["upper_bytes"]}
        attempt |= {"device": "cuda:0", "lease_expires_at": END, "events_offset": 0, "created_at": created}
        attempts.append(attempt | {"ended_at": job["finished_at"]})
        seconds = 0.5 * num_steps
        day = {"job_id": job["id"], "day": created.date(), "project": job["project"], "num_steps": num_steps}
        day |= {"num_tokens": 1024 * num_steps, "train_seconds": seconds, "device_seconds": 1800.0}
        day |= {"measured_seconds": seconds, "planned_byte_seconds": (20 << 30) * seconds}
        days.append(day | {"measured_byte_seconds": (19 << 30) * seconds, "measured_peak_bytes": 19 << 30})
        if state is JobState.SUCCEEDED:
            profile, of_phases = _profile(generator, job, created)
            profiles.append(profile)
            phases += of_phases
    return {
        PlanRow: plans,
        PlanUseRow: uses,
        JobRow: jobs,
        AttemptRow: attempts,
        ProfileRow: profiles,
        ProfilePhaseRow: phases,
        JobDayRow: days,
    }


def _state(number: int, num_jobs: int) -> JobState:
    """The newest 6 % are still queued, a few of those before run, every twentieth of the rest has failed."""
    if number >= num_jobs * 0.94:
        return JobState.QUEUED
    if number >= num_jobs * 0.94 - 8:
        return JobState.RUNNING
    return JobState.FAILED if number % 20 == 0 else JobState.SUCCEEDED


def _profile(generator: random.Random, job: dict[str, Any], created: datetime) -> tuple[dict[str, Any], list[Any]]:
    errors = {phase: [generator.gauss(0.004, 0.006) for _ in range(NUM_CHUNKS)] for phase in PHASES}
    residuals = [
        {"chunk_index": index, "phase": phase, "predicted_bytes": 19 << 30, "measured_bytes": 19 << 30}
        | {"relative_error": errors[phase][index]}
        for index in range(NUM_CHUNKS)
        for phase in PHASES
    ]
    summed = {phase: _errors(found) for phase, found in errors.items()}
    of_step = {name: value for name, value in summed["step"].items() if name != "bucket"}
    profile = {"id": new_id("prof", created), "project": job["project"], "job_id": job["id"], "model": job["model"]}
    profile |= {"plan_id": job["plan_id"], "gpu": job["gpu"], "device": "cuda:0", "num_samples": 500}
    profile |= {"predicted_peak_bytes": 19 << 30, "measured_peak_bytes": 19 << 30, "predicted_step_seconds": 0.5}
    profile |= {"measured_step_seconds": 0.5, "residuals": residuals, "created_at": created} | of_step
    same = {"profile_id": profile["id"], "project": job["project"], "day": created.date(), "model": job["model"]}
    same |= {"gpu": job["gpu"], "num_chunks": NUM_CHUNKS}
    return profile, [same | {"phase": phase} | values for phase, values in summed.items()]


def _errors(errors: list[float]) -> dict[str, float]:
    magnitudes = [abs(error) for error in errors]
    return {
        "mean_error": statistics.fmean(errors),
        "min_error": min(errors),
        "mean_absolute_error": statistics.fmean(magnitudes),
        "max_absolute_error": max(magnitudes),
        "bucket": bucket_of(max(magnitudes)),
    }


def _steps_and_samples(connection: Connection, num_steps: int) -> None:
    """The database writes its own millions of rows."""
    connection.execute(text("CREATE TEMPORARY TABLE numbers (n INTEGER)"))
    connection.execute(text("INSERT INTO numbers VALUES (:n)"), [{"n": n + 1} for n in range(num_steps)])
    connection.execute(text("CREATE TEMPORARY TABLE names (name TEXT)"))
    connection.execute(text("INSERT INTO names VALUES (:name)"), [{"name": phase} for phase in PHASES[:-1]])
    connection.execute(
        text(
            "INSERT INTO metrics (job_id, attempt_id, kind, step, superseded, loss, num_tokens, chunk_index, seconds, "
            "allocated_bytes, reserved_bytes, host_bytes, created_at) "
            "SELECT job_id, id, 'train', n, false, 2.5, 1024, n % 32, 0.5, 20000000000 + n, 21000000000, 30000000, "
            "created_at FROM attempts, numbers ORDER BY id, n"
        )
    )
    connection.execute(
        text(
            "INSERT INTO profile_samples (job_id, attempt_id, step, chunk_index, phase, allocated_bytes, "
            "reserved_bytes, host_bytes, seconds, created_at) "
            "SELECT job_id, id, n, n % 32, name, 20000000000 - n, 21000000000, 30000000, 0.1, created_at "
            "FROM attempts, numbers, names ORDER BY id, n, name"
        )
    )


def answer_times(settings: Settings, clock: FixedClock) -> list[dict[str, Any]]:
    """Milliseconds per query."""
    planner = PlannerProcess(60, 60)
    client = TestClient(create_app(settings, planner=planner, clock=clock), "http://localhost")
    found = []
    for name, path in (QUERIES | OTHERS).items():
        scopes = ("own", "all") if name in QUERIES else ("own",)
        for projects in scopes:
            url = path if projects == "own" else path + ("&" if "?" in path else "?") + "projects=all"
            times, cpu = [], 0.0
            for number in range(-3, NUM_REPEATS):
                if number == 0:
                    times, cpu = [], time.process_time()
                started = time.perf_counter()
                response = client.get(url)
                times.append((time.perf_counter() - started) * 1000)
                assert response.status_code == 200, response.text
            cpu = (time.process_time() - cpu) / len(times) * 1000
            times.sort()
            target = TARGET_MILLISECONDS if name in QUERIES else None
            row = {"query": name, "projects": projects, "p50_ms": round(statistics.median(times), 1)}
            row |= {"p95_ms": round(times[int(0.95 * len(times)) - 1], 1), "target_ms": target}
            row["cpu_ms"] = round(cpu, 1)
            found.append(row | {"response_bytes": len(response.content)})
            figures = f"{row['p50_ms']:8.1f} {row['p95_ms']:8.1f} {target or '-':>8} {row['cpu_ms']:8.1f}"
            print(f"{name:40s} {projects:4s} {figures}", flush=True)
    client.close()
    planner.close()
    return found


def pruning(database: Database, settings: Settings, clock: FixedClock, seconds: float = 10.0) -> dict[str, float]:
    """How fast old rows go, and how long a writer waits meanwhile."""
    stop, deleted, waits = threading.Event(), [], []
    keep = settings.model_copy(update={"samples_retention_days": 1})
    thread = threading.Thread(target=lambda: deleted.append(Retention(database, keep, clock).prune(stop)))
    started = time.perf_counter()
    thread.start()
    while thread.is_alive() and time.perf_counter() - started < seconds:
        begun = time.perf_counter()
        with database.write() as session:
            session.execute(update(PlanRow).where(PlanRow.id == "plan_0").values(step_seconds=begun))
        waits.append((time.perf_counter() - begun) * 1000)
        stop.wait(0.02)
    stop.set()
    thread.join()
    elapsed = time.perf_counter() - started
    waits.sort()
    row = {"rows_per_second": round(sum(deleted[0].values()) / elapsed), "num_writes": len(waits)}
    row |= {
        "write_p50_ms": round(statistics.median(waits), 1),
        "write_p95_ms": round(waits[int(0.95 * len(waits)) - 1], 1),
    }
    row["write_max_ms"] = round(waits[-1], 1)
    print(f"pruning: {row}", flush=True)
    return row


@contextmanager
def database_url(kind: str, folder: Path) -> Iterator[str]:
    """An empty database of a kind."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'chunkplan.db'}"
        return
    with PostgresCluster() as cluster:
        yield cluster.url


def measure(kind: str, num_jobs: int, num_samples: int) -> dict[str, Any]:
    """Fills a database, asks it, and deletes it."""
    with tempfile.TemporaryDirectory(prefix="chunkplan-dashboard-") as name, database_url(kind, Path(name)) as url:
        upgrade(url)
        database = Database(url)
        started = time.perf_counter()
        fill(database, num_jobs, num_samples)
        fill_seconds = round(time.perf_counter() - started, 1)
        print(f"\n{kind}: filled in {fill_seconds} s; p50, p95, target, processor of this process (ms)", flush=True)
        clock = FixedClock()
        clock.time = END
        settings = Settings(data_dir=Path(name), database_url=url, log_format="json")
        queries = answer_times(settings, clock)
        pruned = pruning(database, settings, clock)
        database.dispose()
    return {"database": kind, "fill_seconds": fill_seconds, "queries": queries, "pruning": pruned}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("sqlite", "postgres"))
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=5_000_000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    configure_logging("json")
    logging.getLogger().setLevel(logging.WARNING)
    kinds = [arguments.only] if arguments.only else ["sqlite", "postgres"]
    results = [measure(kind, arguments.jobs, arguments.samples) for kind in kinds]
    figures = {"command": "python -m benchmarks.dashboard", "python": platform.python_version()}
    figures |= {"cores": os.cpu_count(), "load": os.getloadavg()[0], "num_jobs": arguments.jobs}
    figures |= {"num_samples": arguments.samples, "target_ms": TARGET_MILLISECONDS, "databases": results}
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
    slow = [q for result in results for q in result["queries"] if q["target_ms"] and q["p95_ms"] > q["target_ms"]]
    for query in slow:
        print(f"over the target: {query}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
