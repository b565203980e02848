"""SQL on profiles and samples."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, select

from chunkplan.service.db.repository import Repository
from chunkplan.service.db.tables import EventRow, MetricRow, ProfileRow, SampleRow
from chunkplan.service.kit.paging import Window, by_number, newest_first


@dataclass(frozen=True)
class MeasuredPeak:
    """The highest sample of one phase of one chunk."""

    chunk_index: int
    phase: str
    allocated_bytes: int


class ProfileRepository(Repository[ProfileRow]):
    """Profiles and the samples behind them."""

    row, kind = ProfileRow, "profile"

    def page(
        self, window: Window, *, job_id: str | None, model: str | None, gpu: str | None
    ) -> tuple[list[ProfileRow], bool]:
        """Profiles, newest first."""
        statement = select(ProfileRow)
        for column, value in ((ProfileRow.job_id, job_id), (ProfileRow.model, model), (ProfileRow.gpu, gpu)):
            if value is not None:
                statement = statement.where(column == value)
        return newest_first(self._session, statement, ProfileRow.created_at, ProfileRow.id, window)

    def samples(
        self, job_id: str, window: Window, *, chunk_index: int | None, phase: str | None
    ) -> tuple[list[SampleRow], bool]:
        """A job's samples in the order in which they came."""
        statement = select(SampleRow).where(SampleRow.job_id == job_id)
        if chunk_index is not None:
            statement = statement.where(SampleRow.chunk_index == chunk_index)
        if phase is not None:
            statement = statement.where(SampleRow.phase == phase)
        return by_number(self._session, statement, SampleRow.id, window)

    def count_samples(self, job_id: str) -> int:
        """How many samples a job has."""
        return self._session.scalar(select(func.count()).where(SampleRow.job_id == job_id)) or 0

    def phase_peaks(self, job_id: str) -> list[MeasuredPeak]:
        """The highest sample of every phase of every chunk of a job."""
        statement = (
            select(SampleRow.chunk_index, SampleRow.phase, func.max(SampleRow.allocated_bytes))
            .where(SampleRow.job_id == job_id)
            .group_by(SampleRow.chunk_index, SampleRow.phase)
        )
        return [MeasuredPeak(*values) for values in self._session.execute(statement)]

    def memory_peaks(self, job_id: str) -> tuple[int, int]:
        """Highest reserved bytes and highest resident bytes of the trainer; 0 where the records are gone."""
        highest = select(func.max(SampleRow.reserved_bytes), func.max(SampleRow.host_bytes))
        reserved, host = self._session.execute(highest.where(SampleRow.job_id == job_id)).one()
        ends = select(EventRow.data).where(EventRow.job_id == job_id, EventRow.type == "finished")
        of_attempts = [data.get("process_peak_bytes") or 0 for data in self._session.scalars(ends)]
        return reserved or 0, max([host or 0, *of_attempts])

    def mean_step_seconds(self, job_id: str) -> float | None:
        """Mean time of one update."""
        statement = select(func.avg(MetricRow.seconds)).where(MetricRow.job_id == job_id, MetricRow.kind == "train")
        return self._session.scalar(statement)
