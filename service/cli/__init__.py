"""The command ``chunkplan``. Nothing heavy is imported before a verb needs it: see docs/cli.md."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 ok, 1 failed, 2 usage or bad input, 3 does not fit."""
    from chunkplan.service.cli.entry import run

    return run(arguments)
