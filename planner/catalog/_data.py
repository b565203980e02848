"""Reading the data files, and naming near matches when a lookup fails."""

from __future__ import annotations

import json
from collections.abc import Collection
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any


@cache
def load(name: str) -> Any:
    """The parsed content of a JSON file of this folder."""
    return json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))


def near_matches(key: str, known: Collection[str], count: int = 4) -> list[str]:
    """Known names that ``key`` may have meant: those that start with it first, then those spelled alike."""
    starting = sorted(name for name in known if len(key) >= 2 and name.startswith(key))
    alike = get_close_matches(key, known, n=count, cutoff=0.6)
    return list(dict.fromkeys([*starting, *alike]))[:count]


def did_you_mean(key: str, known: Collection[str]) -> str:
    """The tail of an error message about an unknown name: near matches, or nothing."""
    near = near_matches(key, known)
    return f"; did you mean {' or '.join(near)}?" if near else ""
