"""Names of exported models: ``{base}-{size}-{method}-{dataset}-v{n}``. Pure; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_MAX_PART = 48
_SIZE = re.compile(r"(?<![a-z0-9.])\d+(\.\d+)?[mbt](?![a-z0-9])")


def size_name(num_parameters: int) -> str:
    """A count of parameters as model names have it: ``135m``, ``1.1b``, ``70b``."""
    for unit, suffix in ((10**12, "t"), (10**9, "b"), (10**6, "m")):
        if num_parameters >= 0.9995 * unit:
            value = num_parameters / unit
            return f"{value:.1f}".removesuffix(".0") + suffix if value < 9.95 else f"{value:.0f}{suffix}"
    return f"{max(1, round(num_parameters / 1000))}k"


def output_prefix(base: str, num_parameters: int, method: str, dataset: str, suffix: str | None = None) -> str:
    """``{base}-{size}-{method}-{dataset}-v``, to which a number belongs.

    Args:
        base: name of the base model, or its folder; an owner before a slash is left out.
        num_parameters: of the model; a size that the base's name already has is not repeated.
        method: ``chunkft``, ``full`` or ``lora``.
        dataset: name of the data file; its endings are left out.
        suffix: stands in its place.
    """
    name = _plain(base.rstrip("/").rpartition("/")[2])
    data = _plain(_stem(dataset)) if suffix is None else _plain(suffix)
    size = "" if _SIZE.search(name) else size_name(num_parameters)
    return "-".join(part for part in (name or "model", size, method, data or "data", "v") if part)


def output_name(prefix: str, taken: Iterable[str]) -> str:
    """The prefix with the number after the highest one that is taken."""
    numbers = [name.removeprefix(prefix) for name in taken if name.startswith(prefix)]
    return f"{prefix}{max((int(number) for number in numbers if number.isdecimal()), default=0) + 1}"


def _stem(dataset: str) -> str:
    name = Path(dataset).name
    return name.removesuffix("".join(suffix for suffix in Path(name).suffixes if len(suffix) <= 8))


def _plain(text: str) -> str:
    """Lower case, with every character that a folder's name should not have as a hyphen."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-._")[:_MAX_PART].strip("-._")
