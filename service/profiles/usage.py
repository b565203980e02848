"""What a job takes, by day: added up as it is reported, so that nobody has to go through the steps again."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from chunkplan.service.db.tables import JobDayRow, JobRow, PlanRow


class UsageBook:
    """The days of one job, whose row the caller has locked."""

    def __init__(self, session: Session, job: JobRow) -> None:
        self._session = session
        self._job = job
        self._days: dict[date, JobDayRow] = {}
        self._planned_bytes: int | None = None

    def add_step(self, at: datetime, seconds: float, num_tokens: int, allocated_bytes: int | None) -> None:
        """Adds one training step that ended at a time; ``allocated_bytes`` is None when nothing
        was measured.
        """
        day = self._day(at.astimezone(UTC).date())
        day.num_steps += 1
        day.num_tokens += num_tokens
        day.train_seconds += seconds
        if allocated_bytes is not None:
            day.measured_seconds += seconds
            day.planned_byte_seconds += self._planned() * seconds
            day.measured_byte_seconds += allocated_bytes * seconds
            day.measured_peak_bytes = max(day.measured_peak_bytes, allocated_bytes)

    def add_attempt(self, start: datetime, end: datetime) -> None:
        """Adds the time for which an attempt held its device."""
        for day, seconds in seconds_by_day(start, end):
            self._day(day).device_seconds += seconds

    def _day(self, day: date) -> JobDayRow:
        if day not in self._days:
            row = self._session.get(JobDayRow, (self._job.id, day))
            if row is None:
                row = JobDayRow(job_id=self._job.id, day=day, project=self._job.project)
                self._session.add(row)
                self._session.flush()  # fills in the zeros
            self._days[day] = row
        return self._days[day]

    def _planned(self) -> int:
        if self._planned_bytes is None:
            statement = select(PlanRow.upper_bytes).where(PlanRow.id == self._job.plan_id)
            self._planned_bytes = self._session.scalars(statement).one()
        return self._planned_bytes


def seconds_by_day(start: datetime, end: datetime) -> Iterator[tuple[date, float]]:
    """An interval cut at the midnights (UTC) within it; nothing when the clock went back."""
    while start < end:
        day = start.astimezone(UTC).date()
        until = min(end, datetime.combine(day + timedelta(days=1), time(), UTC))
        yield day, (until - start).total_seconds()
        start = until
