"""What is used of torch's inside: in one module, on versions that were tried."""

import re
from pathlib import Path

import torch

from chunkplan.engine.torch_internals import CHECKED_VERSIONS

ROOT = Path(__file__).parents[2]
_INSIDE = re.compile(r"torch\._[a-zA-Z]|torch\.\w+\._[a-zA-Z]|\._cdata\b|_use_count\(|_storage_Use_Count")
_PUBLIC = re.compile(r"torch\.cuda\._memory_viz|torch\.cuda\.memory\._snapshot")


def test_the_installed_torch_was_checked():
    assert torch.__version__.startswith(CHECKED_VERSIONS)


def test_nothing_else_reaches_inside():
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for package in ("engine", "planner", "service")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "torch_internals.py"
        for line in path.read_text().splitlines()
        if _INSIDE.search(_PUBLIC.sub("", line))
    ]
    assert found == []
