"""Printing: tables for people, JSON for scripts, bytes and seconds in units that can be read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

_PLAIN_WIDTH = 160

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@cache
def console() -> Console:
    """Standard output; colours and the terminal's width on a terminal, plain lines elsewhere."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table; columns whose name starts with ``>`` are aligned to the right."""
    table = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", header_style="dim", no_wrap=right)
    for row in rows:
        table.add_row(*row)
    console().print(table)


def gibibytes(num_bytes: float) -> str:
    """``13.72 GiB``; below one GiB ``870.4 MiB``, below 0.1 MiB ``72 B``."""
    if abs(num_bytes) >= 1 << 30:
        return f"{num_bytes / (1 << 30):.2f} GiB"
    return mebibytes(num_bytes) if abs(num_bytes) >= (1 << 20) // 10 else f"{num_bytes:,.0f} B"


def mebibytes(num_bytes: float) -> str:
    """``870.4 MiB``."""
    return f"{num_bytes / (1 << 20):,.1f} MiB"


def duration(seconds: float | None) -> str:
    """``0.52 s``, ``3 min 20 s``, ``2 h 05 min``; ``-`` when unknown."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float | None, digits: int = 4) -> str:
    """A rounded number; ``-`` when there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def moment(time: str | None) -> str:
    """An RFC 3339 time to the minute, UTC: ``2026-11-23 00:11``; ``-`` when there is none."""
    return "-" if time is None else time[:16].replace("T", " ")


def percent(value: float | None) -> str:
    """A signed share in per cent; ``-`` when there is none."""
    return "-" if value is None else f"{value:+.2%}"


def count(value: int | None) -> str:
    """``8.03 B``, ``134.5 M``; ``-`` when there is none."""
    if value is None:
        return "-"
    if value >= 10**9:
        return f"{value / 1e9:.2f} B"
    return f"{value / 1e6:.1f} M" if value >= 10**6 else f"{value:,}"
