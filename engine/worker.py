"""Runs one training attempt, as ``python -m chunkplan.engine.worker --run-dir RUN --attempt N``.

docs/architecture.md describes the protocol: RUN/job.json in, RUN/attempts/N/events.jsonl out, exit codes,
signals.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Literal

from chunkplan.engine.errors import InputError
from chunkplan.engine.process.device_lock import Share, lock_device
from chunkplan.engine.process.parent import StopRequest, stop_with_parent
from chunkplan.engine.process.steady_heap import run_with_steady_heap
from chunkplan.engine.protocol import (
    EXIT_COMPLETED,
    EXIT_DEVICE_BUSY,
    EXIT_STOPPED,
    Event,
    FailedEvent,
    LoadingEvent,
    Report,
)
from chunkplan.engine.spec import RunSpec, parse


class EventFile:
    """Appends one event per line, flushed per line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        """Write one event."""
        self._file.write(json.dumps(event.model_dump(mode="json")) + "\n")
        self._file.flush()


def run_attempt(run_dir: Path, report: Report, stop_requested: Callable[[], bool]) -> int:
    """Train; turn what can go wrong into one ``failed`` event. Returns the exit code."""
    try:
        run = parse(RunSpec, (run_dir / "job.json").read_text())
        from chunkplan.engine.record.tensorboard import TensorBoard
        from chunkplan.engine.training.trainer import Trainer

        report(LoadingEvent())
        with closing(TensorBoard(run_dir / "tensorboard", report)) as board:
            outcome = Trainer(run, run_dir, board, stop_requested).train()
    except InputError as error:
        report(FailedEvent(reason="input", field=error.field, detail=error.message))
        raise
    except Exception as error:
        reason = failure_reason(error)
        detail = str(error) if reason == "diverged" else one_line(error)
        needed = needed_bytes(error) if reason == "out_of_memory" else None
        report(FailedEvent(reason=reason, detail=detail, needed_bytes=needed))
        raise
    return EXIT_COMPLETED if outcome == "completed" else EXIT_STOPPED


def one_line(error: Exception) -> str:
    """Type and first line of an error's message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def failure_reason(error: Exception) -> Literal["diverged", "out_of_memory", "error"]:
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
