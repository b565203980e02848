"""The lock of a device, held by a trainer while it lives: the whole device, or a share of its memory.

The kernel keeps it, so that it goes with the process however that ends. Who takes the whole device shuts out
everybody; who takes a share is let in while all shares together fit. Beside the lock file, a folder holds one
file per share: locked by its holder, and saying how many bytes it takes; one that nobody locks is left over
and removed.
"""

from __future__ import annotations

import fcntl
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class Share:
    """A part of a device's memory."""

    num_bytes: int
    """What the trainer may take."""
    device_bytes: int
    """What all trainers may take together."""
    max_holders: int
    """How many trainers there may be."""


def lock_device(path: Path, share: Share | None = None) -> list[IO[str]] | None:
    """Hold a device while the returned files are open; return None when others hold it, or too much of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("w")
    if not _try_lock(lock, fcntl.LOCK_EX if share is None else fcntl.LOCK_SH):
        lock.close()
        return None
    if share is None:
        return [lock]
    held = _take(path.with_suffix(".shares"), share)
    if held is None:
        lock.close()
        return None
    return [lock, held]


def _take(folder: Path, share: Share) -> IO[str] | None:
    folder.mkdir(exist_ok=True)
    with (folder / "turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # nobody keeps it longer than it takes to look around
        others = list(_held(folder))
        if len(others) >= share.max_holders or sum(others) + share.num_bytes > share.device_bytes:
            return None
        file = (folder / f"{secrets.token_hex(8)}.share").open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(str(share.num_bytes))
        file.flush()
        return file


def _held(folder: Path) -> Iterator[int]:
    """Bytes of every share whose holder lives."""
    for path in folder.glob("*.share"):
        with path.open("r+") as file:
            if _try_lock(file, fcntl.LOCK_EX):
                path.unlink()
            else:
                yield int(file.read())


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
