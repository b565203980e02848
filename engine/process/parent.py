"""What a trainer hears of whoever started it: wishes to stop, and its end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

from chunkplan.engine.protocol import EXIT_FAILED

_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Asks the run to checkpoint and stop, at the first SIGTERM or the parent's death; the second stops now.

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
    """Ask the kernel (Linux) for SIGHUP when process ``parent`` dies; act as if, when it is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGHUP)
