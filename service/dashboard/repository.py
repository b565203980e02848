"""SQL behind the dashboards."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from service.dashboard.schemas import AccuracyRow, UsageRow
from service.db.tables import AttemptRow, JobRow, MetricRow, PlanRow, ProfileRow


class DashboardRepository:
    """Aggregates."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def count_plans(self) -> int:
        """How many plans are stored."""
        return self._session.scalar(select(func.count()).select_from(PlanRow)) or 0

    def count_profiles(self) -> int:
        """How many profiles are stored."""
        return self._session.scalar(select(func.count()).select_from(ProfileRow)) or 0

    def planned_by_device(self, owner: str) -> dict[str, tuple[str, int]]:
        """(job id, plan's upper bound) by the device that a server's running attempts hold."""
        statement = (
            select(AttemptRow.device, AttemptRow.job_id, PlanRow.upper_bytes)
            .join(JobRow, JobRow.id == AttemptRow.job_id)
            .join(PlanRow, PlanRow.id == JobRow.plan_id)
            .where(AttemptRow.ended_at.is_(None), AttemptRow.owner == owner)
        )
        return {device: (job_id, upper) for device, job_id, upper in self._session.execute(statement)}

    def accuracy(self) -> list[AccuracyRow]:
        """Errors by model and device kind, of profiles that were compared."""
        statement = (
            select(
                ProfileRow.model,
                ProfileRow.gpu,
                func.count(),
                func.avg(ProfileRow.mean_absolute_error),
                func.max(ProfileRow.max_absolute_error),
                func.avg(ProfileRow.mean_error),
                func.sum(case((ProfileRow.min_error < 0, 1), else_=0)),
                func.min(ProfileRow.min_error),
            )
            .where(ProfileRow.mean_error.is_not(None))
            .group_by(ProfileRow.model, ProfileRow.gpu)
            .order_by(ProfileRow.model, ProfileRow.gpu)
        )
        names = list(AccuracyRow.model_fields)[2:]
        return [
            AccuracyRow(id=f"{values[0]}@{values[1]}", **dict(zip(names, values, strict=True)))
            for values in self._session.execute(statement)
        ]

    def usage(self, since: datetime) -> list[UsageRow]:
        """Training steps by day, superseded ones included: they were computed too."""
        day = func.date(MetricRow.created_at)
        statement = (
            select(
                day,
                func.count(func.distinct(MetricRow.job_id)),
                func.count(),
                func.sum(MetricRow.num_tokens),
                func.sum(MetricRow.seconds),
            )
            .where(MetricRow.kind == "train", MetricRow.created_at >= since)
            .group_by(day)
            .order_by(day)
        )
        return [
            UsageRow(
                id=str(on), day=on, num_jobs=jobs, num_steps=steps, num_tokens=int(tokens), train_seconds=seconds or 0.0
            )
            for on, jobs, steps, tokens, seconds in self._session.execute(statement)
        ]
