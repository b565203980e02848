"""Prefixed identifiers that sort by creation time: 48 bits of milliseconds, then 80 random bits, base 32."""

from __future__ import annotations

import re
import secrets
from datetime import datetime

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_LENGTH = 26
_WELL_FORMED = re.compile(r"[a-z]{2,6}_[0-9a-zA-Z]{1,64}")


def new_id(prefix: str, now: datetime) -> str:
    """A fresh identifier such as ``job_01jd3…``."""
    number = (int(now.timestamp() * 1000) << 80) | secrets.randbits(80)
    return f"{prefix}_" + "".join(_ALPHABET[(number >> shift) & 31] for shift in range(5 * (_LENGTH - 1), -1, -5))


def is_well_formed(identifier: str) -> bool:
    """Whether a string from a client can be an identifier at all; anything else never reaches the
    database.
    """
    return _WELL_FORMED.fullmatch(identifier) is not None
