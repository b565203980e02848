"""From what is typed to requests: models, devices, sizes, job files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import JobRequest, parse

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def model_reference(given: str) -> str | dict[str, Any]:
    """A catalog name, or a folder: whatever looks like a path and whatever is one (with a
    separator in it).
    """
    path = Path(given).expanduser()
    if given.startswith((".", "~", os.sep)) or (os.sep in given and path.exists()):
        return {"path": str(path.parent if path.name == "config.json" else path)}
    return given


def device_reference(given: str | None) -> str | dict[str, Any]:
    """A catalog name, ``cpu``, or a device as a JSON object; by default what this machine has."""
    if given is None:
        from chunkplan.planner.catalog import detect_gpu

        return detect_gpu().model_dump()
    if not given.lstrip().startswith("{"):
        return given
    try:
        value: dict[str, Any] = json.loads(given)
    except ValueError as error:
        raise InputError("gpu", f"not valid JSON: {error}") from error
    return value


def parse_bytes(field: str, given: str) -> int:
    """``12GiB``, ``12G``, ``12.5 GB`` or a plain number of bytes.

    Raises:
        InputError: for ``field``.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", given, re.IGNORECASE)
    unit = match[2].lower() if match else ""
    factor = (_UNITS | _BINARY_UNITS).get(unit)
    if match is None or factor is None:
        raise InputError(field, f"must be a size such as 12GiB or a number of bytes (got {given!r})")
    return int(float(match[1]) * factor)


def read_job_file(path: Path) -> JobRequest:
    """A job request in a JSON file.

    Raises:
        InputError: it cannot be read, or something in it is wrong; names the field.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError("file", f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError("file", f"{path} is not valid JSON: {error}") from error
    return parse(JobRequest, value)
