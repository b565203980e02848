"""Which planner this is: a digest of its code, so that no answer outlives a change of what made it.

Every module and every table of planner/ and engine/ counts. Which of them decide an answer is not written
down anywhere: a list would be forgotten one day, and what it costs to count too many is one new trace after
an upgrade.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

_PACKAGES = Path(__file__).parent, Path(__file__).parents[1] / "engine"
_LIBRARIES = "torch", "transformers", "peft"
"""Whose own versions decide what a step allocates."""


@cache
def code_digest() -> str:
    """SHA-256 of the planner's and the engine's code and data, and of the libraries' versions, in
    hexadecimal.
    """
    digest = hashlib.sha256(repr([(name, version(name)) for name in _LIBRARIES]).encode())
    for package in _PACKAGES:
        for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".json")):
            digest.update(str(path.relative_to(package)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def planner_version() -> str:
    """The first characters of the digest: what a plan carries."""
    return code_digest()[:12]
