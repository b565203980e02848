"""SQL behind the dashboards. Days are added up from rollups: raw rows are never aggregated for an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from chunkplan.engine.errors import InputError
from chunkplan.service.dashboard.schemas import AccuracyRow, Dimension, UsageRow
from chunkplan.service.db.tables import (
    AttemptRow,
    JobDayRow,
    JobRow,
    MetricRow,
    PlanUseRow,
    ProfilePhaseRow,
    ProfileRow,
)
from chunkplan.service.job_states import JobState
from chunkplan.service.profiles.percentiles import percentiles
from chunkplan.service.profiles.usage import seconds_by_day

_MAX_ROWS = 5_000
_INDEXED = (ProfilePhaseRow.day, ProfilePhaseRow.phase, ProfilePhaseRow.model, ProfilePhaseRow.gpu)
_SHARES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


class DashboardRepository:
    """Aggregates."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def count_plans(self) -> int:
        """How many plans were asked for."""
        return self._session.scalar(select(func.count(PlanUseRow.plan_id.distinct()))) or 0

    def count_profiles(self) -> int:
        """How many profiles are stored."""
        return self._session.scalar(select(func.count()).select_from(ProfileRow)) or 0

    def running_by_device(self, host: str) -> dict[str, list[tuple[str, int]]]:
        """(job id, upper bound) of the attempts that hold a host's devices, by device, the oldest first."""
        statement = (
            select(AttemptRow.device, AttemptRow.job_id, AttemptRow.upper_bytes)
            .where(AttemptRow.ended_at.is_(None), AttemptRow.host == host)
            .order_by(AttemptRow.created_at, AttemptRow.id)
        )
        found: dict[str, list[tuple[str, int]]] = {}
        for device, job_id, upper_bytes in self._session.execute(statement):
            found.setdefault(device, []).append((job_id, upper_bytes))
        return found

    def newest_measured_bytes(self, job_id: str) -> int | None:
        """The highest allocation of a job's newest measured step."""
        statement = (
            select(MetricRow.allocated_bytes)
            .where(MetricRow.job_id == job_id, MetricRow.allocated_bytes.is_not(None))
            .order_by(MetricRow.id.desc())
            .limit(1)
        )
        return self._session.scalar(statement)

    def queue(self, limit: int) -> list[JobRow]:
        """The queued jobs whose turn comes first."""
        turn = (JobRow.turn_at, JobRow.id)
        return self._jobs(select(JobRow.id).where(JobRow.state == JobState.QUEUED).order_by(*turn).limit(limit))

    def recent(self, limit: int) -> list[JobRow]:
        """The jobs that ended last."""
        end = (JobRow.finished_at.desc(), JobRow.id.desc())
        return self._jobs(select(JobRow.id).where(JobRow.finished_at.is_not(None)).order_by(*end).limit(limit))

    def latest_profiles(self, limit: int) -> list[ProfileRow]:
        """The newest profiles."""
        newest = select(ProfileRow.id).order_by(ProfileRow.created_at.desc(), ProfileRow.id.desc()).limit(limit)
        return self._in_order(ProfileRow, list(self._session.scalars(newest)))

    def accuracy(
        self,
        by: Sequence[Dimension],
        *,
        phase: str | None,
        model: str | None,
        gpu: str | None,
        since: date | None,
    ) -> list[AccuracyRow]:
        """Errors of profiles that were compared, in groups.

        Raises:
            InputError: for ``by``, when there are too many groups.
        """
        groups = [getattr(ProfilePhaseRow, dimension) for dimension in by]
        # In the order of the index, and by project, which it starts with: so nothing needs sorting.
        order = [column for column in _INDEXED if column.key in by]
        statement = select(
            *groups,
            ProfilePhaseRow.bucket,
            func.count(),
            func.sum(ProfilePhaseRow.mean_absolute_error),
            func.max(ProfilePhaseRow.max_absolute_error),
            func.sum(ProfilePhaseRow.mean_error),
            func.sum(case((ProfilePhaseRow.min_error < 0, 1), else_=0)),
            func.min(ProfilePhaseRow.min_error),
        ).group_by(ProfilePhaseRow.project, *order, ProfilePhaseRow.bucket)
        wanted = {ProfilePhaseRow.phase: phase, ProfilePhaseRow.model: model, ProfilePhaseRow.gpu: gpu}
        for column, value in wanted.items():
            if value is not None:
                statement = statement.where(column == value)
        if since is not None:
            statement = statement.where(ProfilePhaseRow.day >= since)
        found: dict[tuple[Any, ...], _Errors] = {}
        for values in self._session.execute(statement):
            group = tuple(values[: len(by)])
            if group not in found:
                if len(found) == _MAX_ROWS:
                    raise InputError("by", f"gives more than {_MAX_ROWS} rows: group by less, or ask for fewer days")
                found[group] = _Errors()
            found[group].add(*values[len(by) :])
        return [found[group].row(by, group) for group in sorted(found)]

    def usage(self, since: date, now: datetime) -> list[UsageRow]:
        """What ran, by day and project; attempts that still run count up to now.

        Raises:
            InputError: for ``days``, when there are too many rows.
        """
        key = (JobDayRow.day, JobDayRow.project)
        names = [
            "num_steps",
            "num_tokens",
            "train_seconds",
            "device_seconds",
            "measured_seconds",
            "planned_byte_seconds",
            "measured_byte_seconds",
        ]
        statement = (
            select(
                *key,
                func.sum(case((JobDayRow.num_steps > 0, 1), else_=0)),
                func.max(JobDayRow.measured_peak_bytes),
                *(func.sum(getattr(JobDayRow, name)) for name in names),
            )
            .where(JobDayRow.day >= since)
            .group_by(*key)
        )
        found: dict[tuple[date, str], _Used] = {}
        for day, project, num_jobs, peak_bytes, *sums in self._session.execute(statement):
            found[day, project] = _Used(num_jobs, peak_bytes, **dict(zip(names, sums, strict=True)))
        for project, start in self._running():
            for day, seconds in seconds_by_day(start, now):
                if day >= since:
                    found.setdefault((day, project), _Used()).device_seconds += seconds
        if len(found) > _MAX_ROWS:
            raise InputError("days", f"gives more than {_MAX_ROWS} rows: ask for fewer days")
        return [found[group].row(*group) for group in sorted(found)]

    def _running(self) -> Sequence[tuple[str, datetime]]:
        statement = (
            select(JobRow.project, AttemptRow.created_at)
            .join(JobRow, JobRow.id == AttemptRow.job_id)
            .where(AttemptRow.ended_at.is_(None))
        )
        return [(project, start) for project, start in self._session.execute(statement)]

    def _jobs(self, ids: Any) -> list[JobRow]:
        return self._in_order(JobRow, list(self._session.scalars(ids)))

    def _in_order(self, table: Any, ids: list[str]) -> list[Any]:
        """Rows by their ids: what is wide is read only once it is known which rows are wanted."""
        rows = {row.id: row for row in self._session.scalars(select(table).where(table.id.in_(ids)))}
        return [rows[identifier] for identifier in ids if identifier in rows]


@dataclass
class _Errors:
    """The errors of one group, from what the database has added up by bucket."""

    counts: dict[int, int] = field(default_factory=dict)
    sum_absolute: float = 0.0
    highest: float = 0.0
    sum_signed: float = 0.0
    num_under: int = 0
    lowest: float = float("inf")

    def add(
        self,
        bucket: int,
        count: int,
        sum_absolute: float,
        highest: float,
        sum_signed: float,
        num_under: int,
        lowest: float,
    ) -> None:
        self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.sum_absolute += sum_absolute
        self.highest = max(self.highest, highest)
        self.sum_signed += sum_signed
        self.num_under += int(num_under)
        self.lowest = min(self.lowest, lowest)

    def row(self, by: Sequence[Dimension], group: tuple[Any, ...]) -> AccuracyRow:
        count = sum(self.counts.values())
        shares = percentiles(self.counts, list(_SHARES.values()), highest=self.highest)
        return AccuracyRow(
            id="@".join(str(value) for value in group),
            **dict(zip(by, group, strict=True)),
            num_profiles=count,
            mean_absolute_error=self.sum_absolute / count,
            max_absolute_error=self.highest,
            mean_error=self.sum_signed / count,
            num_under=self.num_under,
            min_error=self.lowest,
            **dict(zip(_SHARES, shares, strict=True)),
        )


@dataclass
class _Used:
    """What ran in one project on one day."""

    num_jobs: int = 0
    measured_peak_bytes: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    train_seconds: float = 0.0
    device_seconds: float = 0.0
    measured_seconds: float = 0.0
    planned_byte_seconds: float = 0.0
    measured_byte_seconds: float = 0.0

    def row(self, day: date, project: str) -> UsageRow:
        measured = self.measured_seconds > 0
        return UsageRow(
            id=f"{day}@{project}",
            day=day,
            project=project,
            num_jobs=self.num_jobs,
            num_steps=self.num_steps,
            num_tokens=int(self.num_tokens),
            train_seconds=self.train_seconds,
            device_seconds=self.device_seconds,
            planned_bytes=round(self.planned_byte_seconds / self.measured_seconds) if measured else None,
            measured_bytes=round(self.measured_byte_seconds / self.measured_seconds) if measured else None,
            measured_peak_bytes=self.measured_peak_bytes if measured else None,
        )
