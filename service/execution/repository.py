"""SQL on attempts. Whatever changes a running attempt is filtered by its token."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from sqlalchemy import CursorResult, func, select, update
from sqlalchemy.orm import Session

from chunkplan.service.db.tables import ArtifactRow, AttemptRow, MetricRow
from chunkplan.service.execution.placement import Load


class AttemptRepository:
    """Attempts and the rows that they write."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, attempt: AttemptRow) -> None:
        """Stores a new attempt."""
        self._session.add(attempt)
        self._session.flush()

    def get(self, attempt_id: str) -> AttemptRow:
        """A stored attempt, as it is now."""
        return self._session.get_one(AttemptRow, attempt_id, populate_existing=True)

    def fenced_update(
        self, attempt_id: str, token: str, values: dict[str, Any], *, at_offset: int | None = None
    ) -> bool:
        """Changes a running attempt if the token is its own (and its event file was read up to
        ``at_offset``).

        Returns:
            False, and nothing was changed, when the token is stale: the attempt has ended, or is somebody
            else's.
        """
        statement = update(AttemptRow).where(
            AttemptRow.id == attempt_id, AttemptRow.token == token, AttemptRow.ended_at.is_(None)
        )
        if at_offset is not None:
            statement = statement.where(AttemptRow.events_offset == at_offset)
        return self._count(statement.values(**values)) == 1

    def renew(self, owner: str, attempt_ids: Collection[str], expires_at: datetime) -> set[str]:
        """Extends the leases of an owner's attempts; returns those that still are its own."""
        statement = update(AttemptRow).where(
            AttemptRow.id.in_(attempt_ids), AttemptRow.owner == owner, AttemptRow.ended_at.is_(None)
        )
        renewed = statement.values(lease_expires_at=expires_at).returning(AttemptRow.id)
        return set(self._session.scalars(renewed, execution_options={"synchronize_session": False}))

    def open(self) -> list[AttemptRow]:
        """Attempts that have not ended, as far as the database knows."""
        return list(self._session.scalars(select(AttemptRow).where(AttemptRow.ended_at.is_(None))))

    def loads(self, host: str) -> dict[str, Load]:
        """What attempts that have not ended take of a host's devices, whoever looks after them."""
        statement = (
            select(AttemptRow.device, func.count(), func.sum(AttemptRow.upper_bytes))
            .where(AttemptRow.ended_at.is_(None), AttemptRow.host == host)
            .group_by(AttemptRow.device)
        )
        return {device: Load(count, int(total)) for device, count, total in self._session.execute(statement)}

    def has_checkpoint(self, job_id: str) -> bool:
        """Whether a job has something to resume from."""
        statement = select(AttemptRow.id).where(AttemptRow.job_id == job_id, AttemptRow.checkpoint_step.is_not(None))
        return self._session.scalar(statement.limit(1)) is not None

    def supersede_metrics(self, job_id: str, attempt_id: str, resumed_step: int) -> None:
        """Takes what earlier attempts did after a step out of the loss curve: it is done again."""
        self._session.execute(
            update(MetricRow)
            .where(MetricRow.job_id == job_id, MetricRow.attempt_id != attempt_id, MetricRow.step > resumed_step)
            .values(superseded=True)
        )

    def artifact(self, job_id: str, name: str) -> ArtifactRow | None:
        """A recorded artifact."""
        return self._session.scalar(select(ArtifactRow).where(ArtifactRow.job_id == job_id, ArtifactRow.name == name))

    def _count(self, statement: Any) -> int:
        result = self._session.execute(statement, execution_options={"synchronize_session": False})
        assert isinstance(result, CursorResult)
        return result.rowcount
