"""How attempts are executed: four verbs, and nothing that says where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from chunkplan.engine.process.device_lock import Share


@dataclass(frozen=True)
class Launch:
    """What it takes to start an attempt."""

    attempt_id: str
    run_dir: Path
    number: int
    device: str
    share: Share | None = None
    """How much of the device it takes, where others may run beside it; None: all of it."""


@dataclass(frozen=True)
class Status:
    """How an attempt's process is."""

    process: str
    """Names it, for whoever finds the attempt after a crash."""
    exit_code: int | None
    """None while it runs; negative: killed by that signal."""


class Execution(Protocol):
    """Runs attempts."""

    def start(self, launch: Launch) -> Status:
        """Starts an attempt, which does nothing before it is told to `begin`.

        Raises:
            OSError: its process cannot be started.
        """

    def begin(self, attempt_id: str) -> None:
        """Lets an attempt begin: its process is on record, so that it will be found whatever happens now."""

    def stop(self, attempt_id: str) -> None:
        """Asks an attempt to checkpoint and stop; returns at once."""

    def kill(self, attempt_id: str) -> None:
        """Ends an attempt at once, with everything that it started."""

    def status(self, attempt_id: str) -> Status:
        """How an attempt is."""

    def forget(self, attempt_id: str) -> None:
        """The attempt has ended and nobody will ask for it again."""
