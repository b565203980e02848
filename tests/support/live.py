"""A real server in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.support.waiting import wait_for

TRAINING = {
    "seq_len": 64,
    "micro_batch_size": 2,
    "precision": "fp32",
    "learning_rate": 1e-3,
    "schedule": {"num_chunks": 4},
}

ENDLESS = 100_000
"""Updates that take longer than any test: an hour."""


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class LiveServer:
    """``python -m chunkplan.service.serve``, or a test's own way to it, on a free port or a given one."""

    def __init__(
        self, environment: dict[str, str], log: Path, port: int | None = None, module: str = "chunkplan.service.serve"
    ) -> None:
        port = port or free_port()
        self._log = log
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CHUNKPLAN_")}
        environment = inherited | {"CHUNKPLAN_PORT": str(port), "OMP_NUM_THREADS": "1"} | environment
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module], env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=150)

    def wait_until_ready(self, seconds: float = 60) -> None:
        """Returns when the server answers that it is ready."""
        wait_for(self.is_ready, "the server to be ready", seconds)

    @property
    def pid(self) -> int:
        """Of the server's process."""
        return self._process.pid

    def trainers(self) -> list[psutil.Process]:
        """The trainers that this server has started and that still run."""
        children = psutil.Process(self._process.pid).children()
        return [child for child in children if "chunkplan.engine.worker" in child.cmdline()]

    def children(self) -> list[psutil.Process]:
        """Every process that this server has started, and theirs."""
        return psutil.Process(self._process.pid).children(recursive=True)

    def suspend(self) -> None:
        """What SIGSTOP does: the process is there and does nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Undoes `suspend`."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """What kill -9 does."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=90)

    def close(self) -> None:
        """Stops the server if it still runs, as it should be."""
        if self._process.poll() is None:
            code = self.stop()
            assert code in {0, -signal.SIGTERM}, self._log.read_text()
        self.http.close()

    def get(self, path: str, **parameters: Any) -> Any:
        """The JSON answer of a GET."""
        response = self.http.get(path, params=parameters)
        assert response.status_code == 200, response.text
        return response.json()

    def post(self, path: str, body: Any = None) -> Any:
        """The JSON answer of a POST that succeeds."""
        response = self.http.post(path, json=body)
        assert response.status_code < 300, response.text
        return response.json()

    def wait_for_state(self, job_id: str, *states: str, seconds: float = 90) -> dict[str, Any]:
        """The job, once it is in one of the states."""

        def probe() -> dict[str, Any] | None:
            job = self.get(f"/v1/jobs/{job_id}")
            assert job["state"] in states or job["state"] not in {"succeeded", "failed", "cancelled", "rejected"}, job
            return job if job["state"] in states else None

        return wait_for(probe, f"job {job_id} to be {' or '.join(states)}", seconds)

    def wait_for_events(self, job_id: str, kind: str, count: int = 1) -> list[dict[str, Any]]:
        """The job's events of one type, once there are enough."""

        def probe() -> list[dict[str, Any]] | None:
            found = [event for event in self.events(job_id) if event["type"] == kind]
            return found if len(found) >= count else None

        return wait_for(probe, f"{count} {kind} events of job {job_id}", 90)

    def events(self, job_id: str) -> list[dict[str, Any]]:
        """All the job's events, page by page."""
        events: list[dict[str, Any]] = []
        after = "0"
        while True:
            page = self.get(f"/v1/jobs/{job_id}/events", limit=1000, after=after)
            events += page["data"]
            if not page["has_more"]:
                return events
            after = page["last_id"]

    def wait_for_attempt_end(self, job_id: str) -> dict[str, Any]:
        """The job's newest attempt that has ended, once there is one."""

        def probe() -> dict[str, Any] | None:
            attempts = self.get(f"/v1/jobs/{job_id}/attempts")["data"]
            return next((attempt for attempt in attempts if attempt["ended_at"]), None)

        return wait_for(probe, f"an attempt of job {job_id} to end", 90)

    def is_ready(self) -> bool:
        """Whether it answers that it is."""
        assert self._process.poll() is None, self._log.read_text()
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended; what nobody has waited for yet has ended too."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
