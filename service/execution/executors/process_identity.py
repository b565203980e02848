"""Naming a process so that a recycled pid is not mistaken for it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class ProcessIdentity:
    """A process: host, pid, and when it was started, by a clock that nobody sets."""

    host: str
    pid: int
    started: str

    @classmethod
    def current(cls) -> ProcessIdentity:
        """This process."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity:
        """A running process of this host.

        Raises:
            psutil.NoSuchProcess: there is none.
        """
        return cls(socket.gethostname(), pid, _start_of(pid))

    @classmethod
    def parse(cls, text: str) -> ProcessIdentity:
        """The identity that `str` wrote."""
        host, pid, started = text.rsplit("/", 2)
        return cls(host, int(pid), started)

    def __str__(self) -> str:
        return f"{self.host}/{self.pid}/{self.started}"

    @property
    def is_local(self) -> bool:
        """Whether it belongs to this host, so that it can be looked at."""
        return self.host == socket.gethostname()

    def is_running(self) -> bool:
        """Whether the process is there; a zombie is not."""
        try:
            return _start_of(self.pid) == self.started and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def _start_of(pid: int) -> str:
    """On Linux the boot, and the kernel's ticks from there: times of day would change when the clock is set.

    Raises:
        psutil.NoSuchProcess: there is none.
    """
    boot, process = Path("/proc/sys/kernel/random/boot_id"), Path(f"/proc/{pid}/stat")
    if not boot.exists():
        return repr(psutil.Process(pid).create_time())
    try:
        after_name = process.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise psutil.NoSuchProcess(pid) from error
    return f"{boot.read_text().strip()}-{after_name[19]}"
