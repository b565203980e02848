"""Idempotency-Key: the same body replays the first answer, another body is refused, one in flight is a
conflict.

The unique key does the work: whoever inserts the row holds the claim, everybody else reads what became of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, CursorResult, delete, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from chunkplan.engine.errors import InputError
from chunkplan.service.db import Database
from chunkplan.service.db.tables import IdempotencyRow
from chunkplan.service.errors import Conflict, Unprocessable
from chunkplan.service.kit.clock import Clock
from chunkplan.service.kit.ids import new_id

HEADER = "Idempotency-Key"
MAX_KEY_LENGTH = 255


@dataclass(frozen=True)
class Claim:
    """The right to answer a request under its key."""

    project: str
    key: str
    claim: str


@dataclass(frozen=True)
class StoredAnswer:
    """A finished request's response."""

    status_code: int
    location: str | None
    body: dict[str, Any]
    replayed: bool = False


class IdempotencyKeys:
    """Claims keys and remembers answers."""

    def __init__(self, database: Database, clock: Clock, claim_seconds: float) -> None:
        self._database = database
        self._clock = clock
        self._claim_duration = timedelta(seconds=claim_seconds)

    def claim(self, project: str, key: str, body_sha256: str) -> Claim | StoredAnswer:
        """Take a key for a request, or get the answer that was given under it.

        Raises:
            InputError: the key itself is malformed.
            Conflict: the first request is still in flight.
            Unprocessable: the key was used with another body.
        """
        if not key or len(key) > MAX_KEY_LENGTH or not key.isascii() or not key.isprintable():
            raise InputError(HEADER, f"should be 1 to {MAX_KEY_LENGTH} printable ASCII characters")
        now = self._clock.now()
        claim = Claim(project, key, new_id("idem", now))
        try:
            with self._database.write() as session:
                session.add(self._row(claim, body_sha256, now))
        except IntegrityError:
            return self._existing(claim, body_sha256, now)
        return claim

    def answer(self, session: Session, claim: Claim, answer: StoredAnswer) -> None:
        """Remember the answer, in the unit of work that did what was asked.

        Raises:
            Conflict: the claim ran out and another request took the key.
        """
        statement = (
            update(IdempotencyRow)
            .where(*_held(claim))
            .values(status_code=answer.status_code, location=answer.location, response=answer.body)
        )
        result = session.execute(statement)
        assert isinstance(result, CursorResult)
        if result.rowcount != 1:
            raise Conflict("idempotency_claim_lost", "this request took too long and another one took its key")

    def release(self, claim: Claim) -> None:
        """Give the key back: the request failed and stored nothing."""
        with self._database.write() as session:
            session.execute(delete(IdempotencyRow).where(*_held(claim)))

    def _row(self, claim: Claim, body_sha256: str, now: datetime) -> IdempotencyRow:
        return IdempotencyRow(
            project=claim.project,
            key=claim.key,
            body_sha256=body_sha256,
            claim=claim.claim,
            created_at=now,
            claim_expires_at=now + self._claim_duration,
        )

    def _existing(self, claim: Claim, body_sha256: str, now: datetime) -> Claim | StoredAnswer:
        with self._database.write() as session:
            row = session.get(IdempotencyRow, (claim.project, claim.key), with_for_update=True)
            if row is None or (row.status_code is None and self._has_run_out(row.claim_expires_at, now)):
                session.merge(self._row(claim, body_sha256, now))
                return claim
            if row.body_sha256 != body_sha256:
                raise Unprocessable("idempotency_key_reused", f"{HEADER} was used before with another body")
            if row.status_code is None:
                raise Conflict("idempotency_in_flight", f"a request with this {HEADER} is still being worked on")
            assert row.response is not None
            return StoredAnswer(row.status_code, row.location, row.response, replayed=True)

    def _has_run_out(self, expires_at: datetime, now: datetime) -> bool:
        """Also when it has longer to go than any claim has: the clock was set back."""
        return not now < expires_at <= now + self._claim_duration


def _held(claim: Claim) -> tuple[ColumnElement[bool], ...]:
    """Picks the row of a claim while it is held."""
    return (
        IdempotencyRow.project == claim.project,
        IdempotencyRow.key == claim.key,
        IdempotencyRow.claim == claim.claim,
    )
