"""Naming a process so that a recycled pid is not mistaken for it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class ProcessIdentity:
    """A process: host, pid, and when it was created."""

    host: str
    pid: int
    created: float

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
        return cls(socket.gethostname(), pid, psutil.Process(pid).create_time())

    @classmethod
    def parse(cls, text: str) -> ProcessIdentity:
        """The identity that `str` wrote."""
        host, pid, created = text.rsplit("/", 2)
        return cls(host, int(pid), float(created))

    def __str__(self) -> str:
        return f"{self.host}/{self.pid}/{self.created!r}"

    @property
    def is_local(self) -> bool:
        """Whether it belongs to this host, so that it can be looked at."""
        return self.host == socket.gethostname()

    def is_running(self) -> bool:
        """Whether the process is there; a zombie is not."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.created and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
