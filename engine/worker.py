"""Runs one training attempt, as ``python -m chunkplan.engine.worker --run-dir RUN --attempt N``.

docs/architecture.md describes the protocol: RUN/job.json in, RUN/attempts/N/events.jsonl out, exit codes,
signals.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from chunkplan.engine.errors import InputError
from chunkplan.engine.process.device_lock import Share, lock_device
from chunkplan.engine.process.steady_heap import run_with_steady_heap
from chunkplan.engine.spec import RunSpec, parse

EXIT_COMPLETED, EXIT_FAILED, EXIT_STOPPED, EXIT_DEVICE_BUSY = 0, 1, 75, 76
_PR_SET_PDEATHSIG = 1


class EventFile:
    """Appends one JSON object per line, flushed per line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, kind: str, **fields: Any) -> None:
        """Write one event with the current time."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._file.write(json.dumps({"type": kind, "time": time, **fields}) + "\n")
        self._file.flush()


class StopRequest:
    """Asks the run to checkpoint and stop: the first SIGTERM, or the death of the parent. A second SIGTERM
    stops now.

    The parent's death is told by SIGHUP, as often as the kernel likes: it sends one for every thread of the
    parent that dies before the last one, so it must never count as somebody's second wish.
    """

    def __init__(self) -> None:
        self._num_terminations = 0
        self._parent_died = False
        signal.signal(signal.SIGTERM, self._on_termination)
        signal.signal(signal.SIGHUP, self._on_death_of_parent)

    def _on_termination(self, number: int, frame: FrameType | None) -> None:
        self._num_terminations += 1
        if self._num_terminations > 1:
            os._exit(EXIT_FAILED)

    def _on_death_of_parent(self, number: int, frame: FrameType | None) -> None:
        self._parent_died = True

    def __call__(self) -> bool:
        """True once a stop was requested."""
        return self._parent_died or self._num_terminations > 0


def stop_with_parent(parent: int) -> None:
    """Ask the kernel for SIGHUP when process ``parent`` dies (Linux), and make sure that it had not died
    before.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGHUP)


def run_attempt(run_dir: Path, report: Callable[..., None], stop_requested: Callable[[], bool]) -> int:
    """Train; turn what can go wrong into one ``failed`` event. Returns the exit code."""
    try:
        run = parse(RunSpec, (run_dir / "job.json").read_text())
        from chunkplan.engine.record.tensorboard import TensorBoard
        from chunkplan.engine.training.trainer import Trainer

        report("loading")
        with closing(TensorBoard(run_dir / "tensorboard", report)) as board:
            outcome = Trainer(run, run_dir, board, stop_requested).train()
    except InputError as error:
        report("failed", reason="input", field=error.field, detail=error.message)
        raise
    except Exception as error:
        reason = failure_reason(error)
        measured = {"needed_bytes": needed_bytes(error)} if reason == "out_of_memory" else {}
        report("failed", reason=reason, detail=str(error) if reason == "diverged" else one_line(error), **measured)
        raise
    return EXIT_COMPLETED if outcome == "completed" else EXIT_STOPPED


def one_line(error: Exception) -> str:
    """Type and first line of an error's message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def failure_reason(error: Exception) -> str:
    """The reason code of a failed event."""
    from torch import OutOfMemoryError

    from chunkplan.engine.training.trainer import Diverged

    if isinstance(error, Diverged):
        return "diverged"
    if isinstance(error, OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out_of_memory"
    return "error"


_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def needed_bytes(error: Exception) -> int:
    """What a run that ran out of memory had at its highest, and what it asked for when it got no more.

    On a GPU of the allocator's reserved bytes, on the CPU of the process.
    """
    import torch

    from chunkplan.engine.record.profiler import process_peak_bytes

    if torch.cuda.is_initialized():
        held = max(torch.cuda.max_memory_reserved(index) for index in range(torch.cuda.device_count()))
    else:
        held = process_peak_bytes()
    asked = re.search(r"allocate (\d+(?:\.\d+)?) ?(bytes|[KMG]iB)", str(error))
    return held + (int(float(asked[1]) * _UNITS[asked[2]]) if asked else 0)


def main() -> int:
    """Entry point of the subprocess."""
    parser = argparse.ArgumentParser(prog="python -m chunkplan.engine.worker", description="Run one training attempt.")
    parser.add_argument("--run-dir", type=Path, required=True, help="folder with job.json")
    parser.add_argument("--attempt", type=int, required=True, help="number of this attempt, from 1")
    parser.add_argument("--lock-file", type=Path, help="lock of the device; exclusive without --share")
    parser.add_argument(
        "--share",
        type=int,
        nargs=3,
        metavar=("BYTES", "DEVICE_BYTES", "MAX_HOLDERS"),
        help="take this much of the device, where all trainers together may take so much, and be so many",
    )
    parser.add_argument("--wait", action="store_true", help="begin when a line comes on standard input; or leave")
    parser.add_argument("--parent-pid", type=int, default=os.getppid(), help="process that must outlive the attempt")
    arguments = parser.parse_args()
    # Threads that wait sleep instead of spinning: beside one busy process, spinning made an update five times
    # slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    stop = StopRequest()
    stop_with_parent(arguments.parent_pid)
    if arguments.wait and not sys.stdin.readline():
        return EXIT_STOPPED  # whoever started it died before it had written that down
    share = Share(*arguments.share) if arguments.share else None
    lock = lock_device(arguments.lock_file, share) if arguments.lock_file else None
    if arguments.lock_file and lock is None:
        print("the device is in use by another trainer", file=sys.stderr)
        return EXIT_DEVICE_BUSY
    own = lock_device(arguments.run_dir / ".lock")
    if own is None:
        print("another trainer runs this job", file=sys.stderr)
        return EXIT_DEVICE_BUSY
    report = EventFile(arguments.run_dir / "attempts" / str(arguments.attempt) / "events.jsonl")
    return run_attempt(arguments.run_dir, report, stop)


def start() -> None:
    """Run as a process of its own, and end it."""
    run_with_steady_heap()
    sys.exit(main())


if __name__ == "__main__":
    start()
