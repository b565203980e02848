"""SQL on API keys."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from chunkplan.service.db.tables import ApiKeyRow
from chunkplan.service.errors import NotFound
from chunkplan.service.kit.ids import is_well_formed


class KeyRepository:
    """Every project's keys."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find(self, key_id: str) -> ApiKeyRow | None:
        """A key by its id."""
        return self._session.get(ApiKeyRow, key_id) if is_well_formed(key_id) else None

    def get(self, key_id: str) -> ApiKeyRow:
        """A key by its id.

        Raises:
            NotFound: there is none.
        """
        row = self.find(key_id)
        if row is None:
            raise NotFound("key", key_id)
        return row

    def any(self) -> bool:
        """Whether a key was ever created: from then on they are required, whatever became of it."""
        return self._session.scalar(select(ApiKeyRow.id).limit(1)) is not None

    def all(self, project: str | None) -> Sequence[ApiKeyRow]:
        """Keys, newest first."""
        statement = select(ApiKeyRow).order_by(ApiKeyRow.created_at.desc(), ApiKeyRow.id.desc())
        if project is not None:
            statement = statement.where(ApiKeyRow.project == project)
        return self._session.scalars(statement).all()

    def add(self, row: ApiKeyRow) -> None:
        """Stores a key."""
        self._session.add(row)

    def touch(self, key_id: str, now: datetime, unless_since: datetime) -> None:
        """Remembers a use, unless there was one lately."""
        is_stale = or_(ApiKeyRow.last_used_at.is_(None), ApiKeyRow.last_used_at < unless_since)
        self._session.execute(update(ApiKeyRow).where(ApiKeyRow.id == key_id, is_stale).values(last_used_at=now))
