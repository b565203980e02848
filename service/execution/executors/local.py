"""Attempts as subprocesses of this server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import chunkplan
from chunkplan.service.execution.executors.process_identity import ProcessIdentity
from chunkplan.service.execution.executors.protocol import Launch, Status

_KEPT_SETTINGS = {"CHUNKPLAN_CACHE_DIR"}


@dataclass(frozen=True)
class _Running:
    process: subprocess.Popen[bytes]
    identity: str

    @property
    def pipe(self) -> IO[bytes]:
        """The process's standard input, by which it is told to begin."""
        assert self.process.stdin is not None
        return self.process.stdin


class LocalExecution:
    """Runs ``python -m chunkplan.engine.worker``, each attempt in a process session of its own.

    The kernel sends an attempt SIGHUP when the thread that started it ends (PDEATHSIG): start attempts from a
    thread that lives as long as the server.
    """

    def __init__(self, locks_dir: Path) -> None:
        self._locks_dir = locks_dir
        self._running: dict[str, _Running] = {}

    def start(self, launch: Launch) -> Status:
        """See `Execution.start`."""
        attempt_dir = launch.run_dir / "attempts" / str(launch.number)
        attempt_dir.mkdir(parents=True, exist_ok=True)
        self._locks_dir.mkdir(parents=True, exist_ok=True)
        lock_file = self._locks_dir / f"{launch.device.replace(':', '-')}.lock"
        command = [sys.executable, "-P", "-m", "chunkplan.engine.worker", "--run-dir", str(launch.run_dir)]
        command += ["--attempt", str(launch.number), "--lock-file", str(lock_file)]
        command += ["--parent-pid", str(os.getpid()), "--wait"]
        if launch.share is not None:
            share = launch.share
            command += ["--share", str(share.num_bytes), str(share.device_bytes), str(share.max_holders)]
        with (attempt_dir / "log.txt").open("ab") as log_file:
            process = subprocess.Popen(
                command,
                cwd=launch.run_dir,
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        identity = str(ProcessIdentity.of(process.pid))
        self._running[launch.attempt_id] = _Running(process, identity)
        return Status(identity, None)

    def begin(self, attempt_id: str) -> None:
        """See `Execution.begin`."""
        running = self._running[attempt_id]
        with suppress(BrokenPipeError):
            running.pipe.write(b"\n")
            running.pipe.close()

    def stop(self, attempt_id: str) -> None:
        """See `Execution.stop`."""
        self._running[attempt_id].process.send_signal(signal.SIGTERM)

    def kill(self, attempt_id: str) -> None:
        """See `Execution.kill`."""
        process = self._running[attempt_id].process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    def status(self, attempt_id: str) -> Status:
        """See `Execution.status`."""
        running = self._running[attempt_id]
        return Status(running.identity, running.process.poll())

    def forget(self, attempt_id: str) -> None:
        """See `Execution.forget`."""
        with suppress(BrokenPipeError):
            self._running.pop(attempt_id).pipe.close()


def _environment() -> dict[str, str]:
    """This process's environment without the service's settings, which hold secrets, and with our packages in
    it.
    """
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("CHUNKPLAN_") or name in _KEPT_SETTINGS
    }
    root = str(Path(chunkplan.__file__).resolve().parents[1])
    paths = [root, *filter(None, [kept.get("PYTHONPATH")])]
    # CUDA numbers devices by speed unless told otherwise; the driver's tool, which names ours, by their
    # place.
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return order | kept | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
