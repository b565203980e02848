"""SQL on jobs, attempts and events."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, func, or_, select

from chunkplan.service.db.repository import Repository
from chunkplan.service.db.tables import ArtifactRow, AttemptRow, CheckpointRow, EventRow, JobRow, MetricRow, ProfileRow
from chunkplan.service.errors import NotFound
from chunkplan.service.job_states import ACTIVE, JobState
from chunkplan.service.kit.ids import is_well_formed
from chunkplan.service.kit.paging import Window, by_number, newest_first


@dataclass(frozen=True)
class Head:
    """How far a job's events have come."""

    last_event: int
    is_final: bool
    """Whether the job has ended, so that this is its last one."""


@dataclass(frozen=True)
class Waiting:
    """A queued job, as far as its turn goes."""

    id: str
    turn_at: datetime
    upper_bytes: int
    device: str
    """What a device must be called."""


class JobRepository(Repository[JobRow]):
    """Jobs and what belongs to them."""

    row, kind = JobRow, "job"

    def lock(self, job_id: str) -> JobRow:
        """A job by its id, locked until the unit of work ends; every change of a job starts here.

        Raises:
            NotFound: there is none.
        """
        statement = select(JobRow).where(JobRow.id == job_id).with_for_update()
        return self.found(self._session.scalar(statement) if is_well_formed(job_id) else None, job_id)

    def page(
        self,
        window: Window,
        *,
        state: JobState | None = None,
        model: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> tuple[list[JobRow], bool]:
        """Jobs, newest first; of metadata, those that hold every given pair."""
        statement = select(JobRow)
        for key, value in (metadata or {}).items():
            statement = statement.where(JobRow.request["metadata"][key].as_string() == value)
        if state is not None:
            statement = statement.where(JobRow.state == state)
        if model is not None:
            statement = statement.where(JobRow.model == model)
        return newest_first(self._session, statement, JobRow.created_at, JobRow.id, window)

    def output_names(self, prefix: str) -> list[str]:
        """Names of jobs' outputs that begin with a prefix."""
        name = JobRow.run_spec["output_name"].as_string()
        return list(self._session.scalars(select(name).where(name.startswith(prefix, autoescape=True))))

    def add(self, row: JobRow) -> None:
        """Stores a new job, so that rows that belong to it can follow."""
        super().add(row)
        self._session.flush()

    def next_queued(
        self,
        device_names: Collection[str],
        now: datetime,
        longest_delay: timedelta,
        *,
        max_bytes: int | None = None,
        passing_over: Collection[str] = (),
    ) -> Waiting | None:
        """The job whose turn it is on a device of these names, of those whose bound is not higher, less some.

        A job that has to wait for longer than the longest delay was delayed before the clock was set back.
        """
        is_due = or_(JobRow.not_before <= now, JobRow.not_before > now + longest_delay)
        found = [self._next_called(name, is_due, max_bytes, passing_over) for name in device_names]
        return min((job for job in found if job is not None), key=lambda job: (job.turn_at, job.id), default=None)

    def _next_called(
        self, name: str, is_due: ColumnElement[bool], max_bytes: int | None, passing_over: Collection[str]
    ) -> Waiting | None:
        statement = (
            select(JobRow.id, JobRow.turn_at, JobRow.upper_bytes, JobRow.device)
            .where(JobRow.state == JobState.QUEUED, JobRow.device == name, is_due)
            .order_by(JobRow.turn_at, JobRow.id)
            .limit(1)
        )
        if max_bytes is not None:
            statement = statement.where(JobRow.upper_bytes <= max_bytes)
        if passing_over:
            statement = statement.where(JobRow.id.not_in(passing_over))
        row = self._session.execute(statement).one_or_none()
        return None if row is None else Waiting(*row)

    def take_queued(self, job_id: str) -> JobRow | None:
        """A queued job, locked until the unit of work ends; None when somebody else was faster."""
        statement = (
            select(JobRow).where(JobRow.id == job_id, JobRow.state == JobState.QUEUED).with_for_update(skip_locked=True)
        )
        return self._session.scalar(statement)

    def unfinished_with_priority(self) -> list[JobRow]:
        """Jobs that have not ended and came with a priority, locked."""
        unfinished = [state for state in JobState if not state.is_final]
        statement = select(JobRow).where(JobRow.state.in_(unfinished), JobRow.priority != 0).with_for_update()
        return list(self._session.scalars(statement))

    def states(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """The states of some jobs."""
        statement = select(JobRow.id, JobRow.state).where(JobRow.id.in_(job_ids))
        return dict(self._session.execute(statement).all())

    def heads(self, job_ids: Collection[str]) -> dict[str, Head]:
        """How far the events of some jobs have come."""
        statement = select(JobRow.id, JobRow.last_event, JobRow.state).where(JobRow.id.in_(job_ids))
        rows = self._session.execute(statement)
        return {job_id: Head(last_event, state.is_final) for job_id, last_event, state in rows}

    def count_by_state(self) -> dict[JobState, int]:
        """How many jobs are in each state; states without a job count 0."""
        counted = dict(self._session.execute(select(JobRow.state, func.count()).group_by(JobRow.state)).all())
        return {state: counted.get(state, 0) for state in JobState}

    def count_unfinished(self) -> int:
        """How many jobs have not ended yet."""
        unfinished = [state for state in JobState if not state.is_final]
        return self._session.scalar(select(func.count()).where(JobRow.state.in_(unfinished))) or 0

    def active(self) -> list[JobRow]:
        """Jobs that may hold a device, oldest first."""
        # Sorted here: SQLite would walk through all jobs in their order rather than sort the few.
        found = self._session.scalars(select(JobRow).where(JobRow.state.in_(ACTIVE)))
        return sorted(found, key=lambda job: job.created_at)

    def oldest_queued_at(self) -> datetime | None:
        """When the job that has waited longest was created."""
        return self._session.scalar(select(func.min(JobRow.created_at)).where(JobRow.state == JobState.QUEUED))

    def uses_file(self, file_id: str) -> str | None:
        """An unfinished job that trains on a file, or is evaluated on it."""
        unfinished = [state for state in JobState if not state.is_final]
        validation = JobRow.request["dataset"]["validation_file_id"].as_string()
        is_used = or_(JobRow.file_id == file_id, validation == file_id)
        return self._session.scalar(select(JobRow.id).where(is_used, JobRow.state.in_(unfinished)).limit(1))

    def attempts(self, job_id: str, window: Window) -> tuple[list[AttemptRow], bool]:
        """Attempts, newest first."""
        statement = select(AttemptRow).where(AttemptRow.job_id == job_id)
        return newest_first(self._session, statement, AttemptRow.created_at, AttemptRow.id, window)

    def events(self, job_id: str, window: Window, *, newest_first: bool = False) -> tuple[list[EventRow], bool]:
        """Events in their order, or in its reverse."""
        statement = select(EventRow).where(EventRow.job_id == job_id)
        return by_number(self._session, statement, EventRow.number, window, newest_first=newest_first)

    def metrics(self, job_id: str, window: Window, kind: str | None) -> tuple[list[MetricRow], bool]:
        """The loss curve: steps that a later attempt took again are left out."""
        statement = select(MetricRow).where(MetricRow.job_id == job_id, MetricRow.superseded.is_(False))
        if kind is not None:
            statement = statement.where(MetricRow.kind == kind)
        return by_number(self._session, statement, MetricRow.id, window)

    def losses_at(self, job_id: str, kind: str, steps: Sequence[int]) -> dict[int, float | None]:
        """The loss at some steps, of those that have one of this kind: ``train`` or ``eval``."""
        statement = select(MetricRow.step, MetricRow.loss).where(
            MetricRow.job_id == job_id,
            MetricRow.kind == kind,
            MetricRow.superseded.is_(False),
            MetricRow.step.in_(steps),
        )
        return dict(self._session.execute(statement).all())

    def trained_tokens(self, job_id: str) -> int:
        """Tokens of the sequences that the loss curve's steps were taken on, padding included."""
        statement = select(func.sum(MetricRow.num_tokens)).where(
            MetricRow.job_id == job_id, MetricRow.kind == "train", MetricRow.superseded.is_(False)
        )
        return int(self._session.scalar(statement) or 0)

    def checkpoints(self, job_id: str, window: Window) -> tuple[list[CheckpointRow], bool]:
        """Checkpoints, newest first."""
        statement = select(CheckpointRow).where(CheckpointRow.job_id == job_id)
        return newest_first(self._session, statement, CheckpointRow.created_at, CheckpointRow.id, window)

    def artifacts(self, job_id: str) -> list[ArtifactRow]:
        """Every artifact, by name."""
        statement = select(ArtifactRow).where(ArtifactRow.job_id == job_id).order_by(ArtifactRow.name)
        return list(self._session.scalars(statement))

    def artifact(self, job_id: str, name: str) -> ArtifactRow:
        """One artifact.

        Raises:
            NotFound: there is none.
        """
        statement = select(ArtifactRow).where(ArtifactRow.job_id == job_id, ArtifactRow.name == name)
        row = None if "\x00" in name else self._session.scalar(statement)
        if row is None:
            raise NotFound("artifact", name)
        return row

    def profile_ids(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Profile id by job id, of those that have one."""
        statement = select(ProfileRow.job_id, ProfileRow.id).where(ProfileRow.job_id.in_(job_ids))
        return dict(self._session.execute(statement).all())
