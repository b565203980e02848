"""Creating, listing, revoking and recognising API keys."""

from __future__ import annotations

import hmac
import re
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta

import structlog
from sqlalchemy.exc import SQLAlchemyError

from chunkplan.engine.errors import InputError
from chunkplan.service.access.keys import Caller, NewKey, Scope, digest, granted, id_in
from chunkplan.service.access.repository import KeyRepository
from chunkplan.service.db import Database
from chunkplan.service.db.tables import ApiKeyRow
from chunkplan.service.errors import Unauthenticated
from chunkplan.service.kit.clock import Clock

log = structlog.get_logger(__name__)

_TOUCH_EVERY = timedelta(minutes=10)
"""``last_used_at`` is no more exact than this, and costs no more than one write in this time."""
_NOBODYS_DIGEST = digest("")
_PROJECT = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_MAX_NAME_LENGTH = 100


class Access:
    """The keys of one database."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._has_keys = False

    def create(
        self, *, name: str, project: str, scopes: Collection[str], expires_at: datetime | None
    ) -> tuple[ApiKeyRow, str]:
        """A new key: its row, and its text, which is nowhere afterwards.

        Raises:
            InputError: for ``name``, ``project``, ``scope`` or ``expires``.
        """
        now = self._clock.now()
        if not name or len(name) > _MAX_NAME_LENGTH or not name.isprintable():
            raise InputError("name", f"should be 1 to {_MAX_NAME_LENGTH} printable characters")
        if not _PROJECT.fullmatch(project):
            raise InputError("project", "should be lower case letters, digits, '.', '_' and '-', at most 64 of them")
        unknown = sorted(set(scopes) - set(Scope))
        if unknown or not scopes:
            raise InputError("scope", f"should be one or more of {', '.join(Scope)} (got {', '.join(unknown)!r})")
        if expires_at is not None and expires_at <= now:
            raise InputError("expires", "lies in the past")
        key = NewKey.mint(now)
        row = ApiKeyRow(
            id=key.id,
            project=project,
            name=name,
            key_sha256=digest(key.text),
            scopes=[scope.value for scope in Scope if scope in scopes],
            created_at=now,
            expires_at=expires_at,
        )
        with self._database.write() as session:
            KeyRepository(session).add(row)
        return row, key.text

    def list(self, project: str | None = None) -> Sequence[ApiKeyRow]:
        """Every key, newest first; of one project where one is named."""
        with self._database.read() as session:
            return KeyRepository(session).all(project)

    def revoke(self, key_id: str) -> ApiKeyRow:
        """Makes a key useless from the next request on; safe to repeat.

        Raises:
            NotFound: there is no such key.
        """
        with self._database.write() as session:
            row = KeyRepository(session).get(key_id)
            row.revoked_at = row.revoked_at or self._clock.now()
        return row

    def is_required(self) -> bool:
        """Whether a key was ever created: from then on every request needs one, also after it was revoked."""
        if not self._has_keys:
            with self._database.read() as session:
                self._has_keys = KeyRepository(session).any()
        return self._has_keys

    def can_let_in(self) -> bool:
        """Whether there is a valid key."""
        now = self._clock.now()
        return any(is_valid(row, now) for row in self.list())

    def recognise(self, text: str) -> Caller:
        """Whom a key stands for.

        Raises:
            Unauthenticated: it stands for nobody, has expired, or was revoked; which of them is not said.
        """
        now = self._clock.now()
        identity = id_in(text)
        with self._database.read() as session:
            row = KeyRepository(session).find(identity) if identity else None
        is_right = hmac.compare_digest(row.key_sha256 if row else _NOBODYS_DIGEST, digest(text))
        if row is None or not is_right or not is_valid(row, now):
            raise Unauthenticated("this API key is not valid")
        if row.last_used_at is None or row.last_used_at < now - _TOUCH_EVERY:
            self._touch(row.id, now)
        return Caller(row.project, granted(row.scopes), row.id)

    def is_still_valid(self, caller: Caller) -> bool:
        """Whether somebody who was let in would be let in again: for what goes on for long."""
        if caller.key_id is None:
            return not self.is_required()
        with self._database.read() as session:
            row = KeyRepository(session).find(caller.key_id)
        return row is not None and is_valid(row, self._clock.now())

    def _touch(self, identity: str, now: datetime) -> None:
        try:
            with self._database.write() as session:
                KeyRepository(session).touch(identity, now, now - _TOUCH_EVERY)
        except SQLAlchemyError:
            log.warning("the use of a key could not be recorded", key=identity)


def is_valid(row: ApiKeyRow, now: datetime) -> bool:
    """Whether a key has been neither revoked nor has expired."""
    return row.revoked_at is None and (row.expires_at is None or now < row.expires_at)
