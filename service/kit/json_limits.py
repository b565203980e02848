"""Guards for JSON that goes into the database and back out as it came."""

from __future__ import annotations

import math
from typing import Any

from chunkplan.engine.errors import InputError

MAX_DEPTH = 32
MAX_VALUES = 200_000


def check_json(field: str, value: Any) -> None:
    """Refuse what JSON text, Postgres or a response cannot carry: NaN, lone surrogates, bottomless nesting.

    Raises:
        InputError: for ``field``.
    """
    num_values = 0
    pending: list[tuple[Any, int]] = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        num_values += 1
        if depth > MAX_DEPTH or num_values > MAX_VALUES:
            raise InputError(field, f"nested deeper than {MAX_DEPTH} levels or larger than {MAX_VALUES} values")
        if isinstance(item, dict):
            pending += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            pending += [(part, depth + 1) for part in item]
        elif isinstance(item, float) and not math.isfinite(item):
            raise InputError(field, "holds a number that is not finite")
        elif isinstance(item, str) and ("\x00" in item or not item.isascii()):
            _check_text(field, item)


def _check_text(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(field, "holds text that is not valid Unicode") from error
    if "\x00" in text:
        raise InputError(field, "holds a NUL character")
