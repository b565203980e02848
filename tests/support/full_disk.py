"""A full disk, for one process: the kernel refuses what it writes beyond a size, in every file."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def full_disk(pid: int, at_bytes: int = 0) -> Iterator[None]:
    """While the block runs, no file of a process grows beyond ``at_bytes``: its writes fail (EFBIG)."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (at_bytes, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def fill_disk_for(pid: int, at_bytes: int) -> None:
    """The same until the process ends."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (at_bytes, at_bytes))
