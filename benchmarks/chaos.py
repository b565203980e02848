"""Is anything lost when it is killed? Short jobs while servers and trainers die at random moments.

Run: ``python -m benchmarks.chaos --database sqlite|postgres --jobs 200 --kills 50 --seed 1``. A real server,
real trainers of a tiny model, and users who submit, cancel, pause, resume and listen through every restart.
What must hold in the end is in `benchmarks.chaos_checks`. An attempt takes about six seconds of one core,
nearly all of them imports.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.chaos_checks import Asked, find_violations
from chunkplan.service.db import Database
from chunkplan.service.db.tables import AttemptRow
from tests.support.live import TRAINING, LiveServer, free_port, gone
from tests.support.model import write_chats, write_tiny_model
from tests.support.postgres import PostgresCluster
from tests.support.waiting import wait_for

RESULT = Path(__file__).parent / "results" / "chaos.json"
MODEL = "smollm2-135m-instruct"
FINAL = {"succeeded", "failed", "cancelled", "rejected"}
LEASE_SECONDS = 10
SETTINGS = {
    "LEASE_SECONDS": LEASE_SECONDS,
    "DATABASE_TIMEOUT_SECONDS": 5,
    "RETRY_DELAY_SECONDS": 0.2,
    "PLAN_TIMEOUT_SECONDS": 60,
    "PLAN_QUEUE_SECONDS": 10,
    "PLAN_PROCESSES": 1,
    "MAX_ATTEMPTS": 10,  # by default three deaths in a row without progress are a job's own fault; here none is
    "QUOTA__REQUESTS_PER_SECOND": 10_000,
    "QUOTA__REQUESTS_BURST": 10_000,
}
WEIGHTS = {"server": 20, "trainer": 17, "both": 8, "suspended": 5}
"""Kinds of kills, out of fifty."""
DEEDS = {"wait": 56, "cancel": 18, "cancel running": 8, "pause": 10, "pause running": 8}
"""What users do to a job, out of a hundred."""
NUM_USERS = 6
MAX_STEPS, CHECKPOINT_EVERY = 24, 3
PATIENCE_SECONDS = 900.0
"""For one thing to happen on a machine that is busy."""


@dataclass
class Tally:
    """What happened, counted by several threads."""

    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self.counts[what] += number

    def violation(self, line: str) -> None:
        with self._lock:
            self.violations.append(line)
        print(f"VIOLATION {line}", flush=True)

    def add(self, asked: Asked) -> None:
        with self._lock:
            self.asked.append(asked)

    @property
    def num_ended(self) -> int:
        return len(self.asked)


class Stage:
    """One database, one data folder, and the servers on them."""

    def __init__(self, folder: Path, database_url: str) -> None:
        self.folder = folder
        self.database_url = database_url
        self.data = folder / "data.jsonl"
        self.runs = folder / "var" / "jobs"
        write_tiny_model(folder / "models" / MODEL)
        write_chats(self.data, num_rows=16)
        self._environment = {
            "CHUNKPLAN_DATABASE_URL": database_url,
            "CHUNKPLAN_DATA_DIR": str(folder / "var"),
            "CHUNKPLAN_MODELS_DIR": str(folder / "models"),
            "CHUNKPLAN_CACHE_DIR": str(folder / "traces"),
            "CHUNKPLAN_DATASET_ROOTS": json.dumps([str(folder)]),
            **{f"CHUNKPLAN_{name}": str(value) for name, value in SETTINGS.items()},
        }
        self._others: set[int] = set()
        self._plan_once()
        self.server = self.start_server(elsewhere=True)

    def start_server(self, *, elsewhere: bool = False, **settings: object) -> LiveServer:
        """A server on the port of the last one, or on another."""
        port = free_port() if elsewhere else httpx.URL(self.url).port
        given = {"CHUNKPLAN_PORT": str(port)} | {f"CHUNKPLAN_{name}": str(value) for name, value in settings.items()}
        server = LiveServer(self._environment | given, self.folder / "server.log", port)
        self.server, self.url = server, str(server.http.base_url)
        return server

    def _plan_once(self) -> None:
        """The first plan traces, which takes minutes where the machine is busy; later ones need not."""
        server = self.start_server(elsewhere=True, PLAN_TIMEOUT_SECONDS=PATIENCE_SECONDS)
        server.wait_until_ready(PATIENCE_SECONDS)
        server.http.timeout = PATIENCE_SECONDS

        def probe() -> bool:
            answer = server.http.post("/v1/jobs", params={"dry_run": True}, json=self.request())
            assert answer.status_code in {200, 503}, answer.text
            return answer.status_code == 200

        wait_for(probe, "the first plan", PATIENCE_SECONDS)
        server.close()

    def request(self) -> dict[str, Any]:
        """The job that everybody submits: whatever happens to it, its weights end the same."""
        training = {**TRAINING, "max_steps": MAX_STEPS, "checkpoint_every": CHECKPOINT_EVERY}
        dataset = {"path": str(self.data), "eval_fraction": 0.0}
        return {"name": "chaos", "model": MODEL, "gpu": "cpu", "dataset": dataset, "training": training}

    def processes(self) -> dict[psutil.Process, list[str]]:
        """Every process of this stage with its command line: servers, planners, trainers."""
        found = {}
        pids = set(psutil.pids())
        self._others &= pids  # looked at once
        for pid in pids - self._others:
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.environ().get("CHUNKPLAN_CACHE_DIR") != str(self.folder / "traces"):
                    self._others.add(pid)
                elif not gone(process):
                    found[process] = process.cmdline()
        return found

    def forget_others(self) -> None:
        """Looks at every process again, whatever it was before."""
        self._others.clear()

    def trainers(self) -> dict[psutil.Process, str]:
        """The trainers that run, and their jobs."""
        return {
            process: Path(line[line.index("--run-dir") + 1]).name
            for process, line in self.processes().items()
            if "chunkplan.engine.worker" in line and "--run-dir" in line
        }


class User(threading.Thread):
    """Submits one job after the other, does to it what was drawn, and waits for its end."""

    def __init__(
        self, stage: Stage, tally: Tally, jobs: Iterable[int], seed: int, is_over: Callable[[int], bool]
    ) -> None:
        super().__init__(name="user", daemon=True)
        self._stage = stage
        self._tally = tally
        self._jobs = jobs
        self._seed = seed
        self._is_over = is_over
        self._http = httpx.Client(timeout=15)
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with self._http:
                for number in self._jobs:
                    if self._is_over(number):
                        return
                    self._tally.add(self._one(number))
        except BaseException as error:  # the main thread tells
            self.error = error

    def _one(self, number: int) -> Asked:
        choice = random.Random(f"{self._seed}/{number}")
        key = f"chaos-{self._seed}-{number}"
        answer = self._ask("POST", "/v1/jobs", json=self._stage.request(), headers={"Idempotency-Key": key})
        assert answer.status_code == 201, answer.text
        job_id = answer.json()["id"]
        deed = choice.choices(list(DEEDS), list(DEEDS.values()))[0]
        follows = number % 4 == 0
        listener = Listener(self._stage, self._tally, job_id) if follows else None
        if listener is not None:
            listener.start()
        cancelled = self._do(deed, job_id)
        state = self._wait(job_id, FINAL)
        if listener is not None:
            listener.join()
        return Asked(job_id, deed, cancelled, state, None if listener is None else listener.seen)

    def _do(self, deed: str, job_id: str) -> bool:
        """What a user wants of a job; whether it was told that the job will be cancelled."""
        if deed == "wait":
            return False
        if deed.endswith("running"):
            self._wait(job_id, FINAL | {"running"})
        if deed.startswith("cancel"):
            return self._steer(job_id, "cancel")
        if self._steer(job_id, "pause") and self._wait(job_id, FINAL | {"paused"}) == "paused":
            self._steer(job_id, "resume")
        return False

    def _steer(self, job_id: str, verb: str) -> bool:
        answer = self._ask("POST", f"/v1/jobs/{job_id}/{verb}")
        if answer.status_code == 409:  # it has ended, or can't any more
            return False
        assert answer.status_code == 202, answer.text
        self._tally.count(f"{verb} accepted")
        return True

    def _wait(self, job_id: str, states: set[str]) -> str:
        def probe() -> str | None:
            state = self._ask("GET", f"/v1/jobs/{job_id}").json()["state"]
            return state if state in states else None

        return wait_for(probe, f"job {job_id} to be {' or '.join(sorted(states))}", PATIENCE_SECONDS * 2, every=0.6)

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The answer; asked again while there is no server, or a busy one."""

        def probe() -> httpx.Response | None:
            try:
                answer = self._http.request(method, self._stage.url + path, **options)
            except httpx.TransportError as error:
                self._tally.count("requests repeated: no answer")
                self._tally.count(f"requests repeated: {type(error).__name__}")
                return None
            code = answer.json().get("code") if answer.status_code >= 400 else None
            if answer.status_code == 500:
                self._tally.violation(f"{method} {path} was answered with 500: {code}")
            if answer.status_code in {429, 500, 503} or code == "idempotency_in_flight":
                self._tally.count(f"requests repeated: {answer.status_code} {code}")
                return None
            return answer

        return wait_for(probe, f"an answer to {method} {path}", PATIENCE_SECONDS, every=0.1)


class Listener(threading.Thread):
    """Follows one job's stream through every restart, as browsers do: with the id of the last
    event it saw.
    """

    def __init__(self, stage: Stage, tally: Tally, job_id: str) -> None:
        super().__init__(name=f"listener-{job_id}", daemon=True)
        self._stage = stage
        self._tally = tally
        self._path = f"/v1/jobs/{job_id}/events/stream"
        self._http = httpx.Client(timeout=20)
        self.seen: list[tuple[int, str]] = []
        self._is_over = False

    def run(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS * 3
        pause = threading.Event()
        with self._http:
            while not self._is_over and time.monotonic() < deadline:
                with suppress(httpx.HTTPError):
                    self._listen()
                if not self._is_over:
                    self._tally.count("streams resumed")
                    pause.wait(0.2)

    def _listen(self) -> None:
        headers = {"Last-Event-ID": str(self.seen[-1][0])} if self.seen else {}
        fields: dict[str, str] = {}
        with self._http.stream("GET", self._stage.url + self._path, headers=headers) as stream:
            stream.raise_for_status()
            for line in stream.iter_lines():
                name, _, value = line.partition(": ")
                if name:
                    fields[name] = value
                elif "id" in fields:
                    event = json.loads(fields["data"])
                    self.seen.append((int(fields["id"]), event["type"]))
                    self._is_over = event["type"] == "state" and event["data"]["state"] in FINAL
                    fields = {}


class Watch(threading.Thread):
    """Looks again and again whether two trainers of one job are alive."""

    def __init__(self, stage: Stage, tally: Tally) -> None:
        super().__init__(name="watch", daemon=True)
        self._stage = stage
        self._tally = tally
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(0.5):
            trainers = self._stage.trainers()
            self._tally.count("looks at trainers")
            jobs = Counter(trainers.values())
            for job_id in (job_id for job_id, count in jobs.items() if count > 1):
                alive = [process for process, job in trainers.items() if job == job_id and not gone(process)]
                if len(alive) > 1:
                    self._tally.violation(f"{job_id}: {len(alive)} trainers at once: {[p.pid for p in alive]}")

    def stop(self) -> None:
        self._stopping.set()
        self.join()


class Killer:
    """Kills at random moments, and starts again what was killed."""

    def __init__(self, stage: Stage, tally: Tally, num_jobs: int, deck: list[str], seed: int) -> None:
        self._stage = stage
        self._tally = tally
        self._random = random.Random(f"killer {seed}")
        self._deck = deck
        self._after = sorted(self._random.uniform(0, num_jobs * 0.92 - 1) for _ in deck)
        self._database = Database(stage.database_url)
        self._pause = threading.Event()
        self.is_done = False

    def run(self, users: list[User]) -> None:
        """Every kill, each not before a number of jobs has ended."""
        for kind, after in zip(self._deck, self._after, strict=True):
            wait_for(
                lambda after=after: self._tally.num_ended >= after or not any(user.is_alive() for user in users),
                f"{after:g} jobs to end",
                PATIENCE_SECONDS * 4,
                every=0.5,
            )
            while any(user.is_alive() for user in users):
                if self._kill(kind, users):
                    self._tally.count(f"kills: {kind}")
                    print(f"{self._tally.num_ended} jobs ended, killed: {kind}", flush=True)
                    break
        self.is_done = True
        self._database.dispose()

    def _kill(self, kind: str, users: list[User]) -> bool:
        trainers = self._moment(kind, users)
        server = self._stage.server
        if not any(user.is_alive() for user in users):
            return False
        if kind in {"trainer", "both"}:
            if not trainers:
                return False
            with suppress(psutil.NoSuchProcess):
                self._random.choice(trainers).kill()
        if kind in {"server", "both"}:
            server.kill()
            server.close()
            self._pause.wait(self._random.uniform(0, 2))
            self._restart()
        if kind == "suspended":
            self._suspend(server)
        return True

    def _moment(self, kind: str, users: list[User]) -> list[psutil.Process]:
        """Any moment, or more often one while a trainer trains: most of its life it only imports. Its
        trainers.
        """
        trains = self._random.random() < 0.6
        self._pause.wait(self._random.uniform(0, 6))

        def probe() -> list[psutil.Process] | None:
            trainers = self._stage.trainers()
            if not any(user.is_alive() for user in users):
                return []
            if not trains and (trainers or kind not in {"trainer", "both"}):
                return list(trainers)
            return [process for process, job_id in trainers.items() if self._has_started(job_id)] or None

        found = wait_for(lambda: None if (now := probe()) is None else (now,), "a moment", PATIENCE_SECONDS, every=0.2)[
            0
        ]
        self._pause.wait(self._random.uniform(0, 1.0) if trains else 0)
        return [process for process in found if not gone(process)] or list(self._stage.trainers())

    def _has_started(self, job_id: str) -> bool:
        attempts = sorted(self._stage.runs.glob(f"{job_id}/attempts/*/events.jsonl"), key=lambda path: path.parent.name)
        return bool(attempts) and '"started"' in attempts[-1].read_text()

    def _restart(self) -> None:
        server = self._stage.start_server()
        if self._random.random() < 0.2:
            self._pause.wait(self._random.uniform(0, 2))  # killed again while it starts
            server.kill()
            server.close()
            self._tally.count("servers killed while starting")
            server = self._stage.start_server()
        server.wait_until_ready(PATIENCE_SECONDS)

    def _suspend(self, server: LiveServer) -> None:
        """SIGSTOP until the lease has run out. On Postgres another server takes over meanwhile, and stays."""
        server.suspend()
        if self._stage.database_url.startswith("sqlite"):  # may hold its one write lock: others can but wait
            self._pause.wait(LEASE_SECONDS * 1.3)
            server.wake()
            server.wait_until_ready(PATIENCE_SECONDS)
            return
        other = self._stage.start_server(elsewhere=True)
        try:
            other.wait_until_ready(PATIENCE_SECONDS)
            wait_for(lambda: not self._has_open_attempts(server.pid), "its attempts to end", PATIENCE_SECONDS)
        finally:
            server.wake()
        server.wait_until_ready(PATIENCE_SECONDS)
        self._pause.wait(self._random.uniform(0, 8))  # both work
        server.close()

    def _has_open_attempts(self, pid: int) -> bool:
        with self._database.read() as session:
            owners = session.query(AttemptRow.owner).where(AttemptRow.ended_at.is_(None)).all()
        return any(f"/{pid}/" in owner for (owner,) in owners)


def shuffled_deck(num_kills: int, seed: int) -> list[str]:
    """Kinds of kills, about as many of each as `WEIGHTS` says."""
    deck = [kind for kind, weight in WEIGHTS.items() for _ in range(-(-weight * num_kills // 50))]
    return random.Random(f"deck {seed}").sample(deck, num_kills)


def chaos(
    folder: Path, database_url: str, num_jobs: int, deck: list[str], seed: int, minutes: float = math.inf
) -> dict[str, Any]:
    """The run and what it showed.

    Users submit so many jobs, and more until every kill of the deck has happened; after so many minutes, no
    more.
    """
    begin = time.monotonic()
    stage, tally = Stage(folder, database_url), Tally()
    killer = Killer(stage, tally, num_jobs, deck, seed)

    def is_over(number: int) -> bool:
        return (number >= num_jobs and killer.is_done) or time.monotonic() > begin + 60 * minutes

    num_users = min(NUM_USERS, num_jobs)
    users = [User(stage, tally, itertools.count(i, num_users), seed, is_over) for i in range(num_users)]
    watch = Watch(stage, tally)
    try:
        stage.server.wait_until_ready(PATIENCE_SECONDS)
        for thread in (watch, *users):
            thread.start()
        killer.run(users)
        for user in users:
            user.join()
            if user.error is not None:
                raise user.error
        stage.server.close()  # asserts that it ends as it should
        watch.stop()
    finally:
        stage.forget_others()
        left = stage.processes()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
    for process, line in left.items():
        tally.violation(f"process {process.pid} is left: {' '.join(line)}")
    checked = find_violations(database_url, folder / "var", tally.asked, MAX_STEPS)
    for line in checked.violations:
        tally.violation(line)
    log = (folder / "server.log").read_text(errors="replace")
    return {
        "jobs": tally.num_ended,
        "kills": {kind: tally.counts[f"kills: {kind}"] for kind in WEIGHTS},
        "seed": seed,
        "seconds": round(time.monotonic() - begin),
        "users": {name: count for name, count in sorted(tally.counts.items()) if not name.startswith("kills: ")},
        "checked": checked.figures,
        "supervisor_rounds_failed": log.count("the supervisor's round failed"),
        "violations": tally.violations,
    }


@contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    """An empty database of a kind."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'chunkplan.db'}"
        return
    with PostgresCluster() as cluster:
        yield cluster.url


def main() -> int:
    """One run; 1 if anything was violated."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--database", choices=("sqlite", "postgres"), required=True)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which users submit no more")
    parser.add_argument("--keep", type=Path, help="folder for the run's files; by default they are removed")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="chunkplan-chaos-") as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with database(arguments.database, folder) as url:
            deck = shuffled_deck(arguments.kills, arguments.seed)
            result = chaos(folder, url, arguments.jobs, deck, arguments.seed, arguments.minutes)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "command": f"python -m benchmarks.chaos {' '.join(sys.argv[1:])}",
        "commit": commit.stdout.strip(),
    } | result
    print(json.dumps(result, indent=1))
    stored = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    arguments.output.write_text(json.dumps(stored | {arguments.database: result}, indent=1) + "\n")
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
