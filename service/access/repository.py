"""SQL on API keys."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import or_, select, update

from chunkplan.service.db.repository import Repository
from chunkplan.service.db.tables import ApiKeyRow


class KeyRepository(Repository[ApiKeyRow]):
    """Every project's keys."""

    row, kind = ApiKeyRow, "key"

    def any(self) -> bool:
        """Whether a key was ever created: from then on they are required, whatever became of it."""
        return self._session.scalar(select(ApiKeyRow.id).limit(1)) is not None

    def all(self, project: str | None) -> Sequence[ApiKeyRow]:
        """Keys, newest first."""
        statement = select(ApiKeyRow).order_by(ApiKeyRow.created_at.desc(), ApiKeyRow.id.desc())
        if project is not None:
            statement = statement.where(ApiKeyRow.project == project)
        return self._session.scalars(statement).all()

    def touch(self, key_id: str, now: datetime, unless_since: datetime) -> None:
        """Remembers a use, unless there was one lately."""
        is_stale = or_(ApiKeyRow.last_used_at.is_(None), ApiKeyRow.last_used_at < unless_since)
        self._session.execute(update(ApiKeyRow).where(ApiKeyRow.id == key_id, is_stale).values(last_used_at=now))
