"""Reads what a trainer reports (`chunkplan.engine.protocol`) from its event file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from chunkplan.engine.protocol import Event, parse_event

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Batch:
    """Messages read from an event file, and where reading goes on."""

    messages: list[Event]
    next_offset: int


def read_messages(path: Path, offset: int, max_bytes: int = 1 << 20) -> Batch:
    """Complete lines from ``offset`` on; a last line without its newline is left for the next time.

    A line that says nothing understandable is logged and passed over: it must not stop what comes after it.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            block = file.read(max_bytes)
            if len(block) == max_bytes and b"\n" not in block:
                block += file.readline()
    except FileNotFoundError:
        return Batch([], offset)
    end = block.rfind(b"\n") + 1
    messages = [message for line in block[:end].splitlines() if (message := _parse(line)) is not None]
    return Batch(messages, offset + end)


def _parse(line: bytes) -> Event | None:
    try:
        return parse_event(_storable(json.loads(line)))
    except (ValueError, ValidationError, RecursionError) as error:
        log.warning("a trainer's line was passed over", error=str(error).splitlines()[0], line=line[:200])
        return None


def _storable(value: Any) -> Any:
    """What no JSON column can hold is made harmless: numbers that are not finite, NUL, halves of surrogate
    pairs.
    """
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_storable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return value.replace("\x00", "").encode(errors="replace").decode()
    return value
