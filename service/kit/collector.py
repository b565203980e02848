"""Python's garbage collector, in processes that are ours alone."""

from __future__ import annotations

import gc

_YOUNG, _MIDDLE, _OLD = 100_000, 50, 50


def collect_rarely() -> None:
    """Let this process look for reference cycles far less often.

    A plan makes hundreds of thousands of small objects that stay, and no cycles: looking through them again
    and again takes a third of the time of ``auto``. Only a process of our own may be told so: the planner
    itself, which others import, leaves the collector alone.
    """
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)
