"""API keys: ``cpk_<id>_<secret>``. The id is public and finds the row; of the secret only a hash is stored.
Pure.

A secret is 256 random bits, so that one SHA-256 is enough: there is nothing to guess that a slow hash would
protect.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from chunkplan.service.db.base import DEFAULT_PROJECT
from chunkplan.service.kit.ids import new_id

_FORMAT = re.compile(r"cpk_([0-9a-z]{26})_[A-Za-z0-9_-]{43}")
SECRETS = re.compile(r"cpk_([0-9a-z]{26})_[A-Za-z0-9_-]+")
"""Finds keys in any text, so that logs can leave them out."""


class Scope(StrEnum):
    """What a key may do. ``submit`` and ``admin`` include ``read``."""

    READ = "read"
    """Whatever shows the project's own."""
    SUBMIT = "submit"
    """Whatever plans, stores, changes or deletes."""
    ADMIN = "admin"
    """Metrics and dashboards over every project."""


def granted(scopes: Iterable[str]) -> frozenset[Scope]:
    """The given scopes with those that they include."""
    given = frozenset(map(Scope, scopes))
    return given | {Scope.READ} if given else given


@dataclass(frozen=True)
class Caller:
    """Whom a request is answered for."""

    project: str
    scopes: frozenset[Scope]
    key_id: str | None
    """None: nobody needs a key yet."""


ANYBODY = Caller(DEFAULT_PROJECT, frozenset(Scope), None)
"""Who asks while no key is needed: the one person on this machine."""


@dataclass(frozen=True)
class NewKey:
    """A key at the only moment at which it is known."""

    id: str
    text: str

    @classmethod
    def mint(cls, now: datetime) -> NewKey:
        """A fresh key."""
        key_id = new_id("key", now)
        return cls(key_id, f"cpk_{key_id.removeprefix('key_')}_{secrets.token_urlsafe(32)}")


def digest(text: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(text.encode()).hexdigest()


def id_in(text: str) -> str | None:
    """The id that a key contains; None when the text is no key."""
    match = _FORMAT.fullmatch(text)
    return f"key_{match[1]}" if match else None
