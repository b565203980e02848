"""How a trainer's process uses glibc's heap: steadily, so that its resident memory can be planned.

glibc moves its thresholds while a program runs, and keeps what was freed for later: blocks that do not fit
the holes make the heap grow, and nobody can say by how much. Here every block of 256 KiB or more is mapped on
its own, and goes back to the system when it is freed, so that resident memory is what tensors hold. The
kernel has to clear such pages again each time: docs/decisions/0012-calibration.md has what was measured, and
what that costs. Small blocks share a heap without per-thread caches, whose slivers keep holes from joining;
it is trimmed after every update and evaluation. Imports no torch.
"""

from __future__ import annotations

import ctypes
import os
import sys

_VARIABLE = "GLIBC_TUNABLES"
_SETTINGS = (
    "glibc.malloc.tcache_count=0",
    "glibc.malloc.mxfast=0",
    f"glibc.malloc.mmap_threshold={256 * 1024}",
    f"glibc.malloc.trim_threshold={2**31 - 1}",
)


def run_with_steady_heap() -> None:
    """Begin this program anew in the same process, with the settings in its environment, unless it has them.

    The C library reads them before anything else runs. Where it is another one, they mean nothing.
    """
    given = [setting for setting in os.environ.get(_VARIABLE, "").split(":") if setting]
    if sys.platform != "linux" or set(_SETTINGS) <= set(given):
        return
    names = {setting.partition("=")[0] for setting in _SETTINGS}
    others = [setting for setting in given if setting.partition("=")[0] not in names]
    os.environ[_VARIABLE] = ":".join([*others, *_SETTINGS])
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - itself, and there is no shell


def trim_heap() -> None:
    """Give what the C library keeps of freed memory back to the system (glibc; elsewhere nothing happens)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
