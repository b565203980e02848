"""Where the planner keeps what it has learned."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder of traces and of this machine's calibration: ``CHUNKPLAN_CACHE_DIR``, or one in the
    user's home.
    """
    given = os.environ.get("CHUNKPLAN_CACHE_DIR")
    return Path(given) if given else Path.home() / ".cache" / "chunkplan"
