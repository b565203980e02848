"""The supervisor's book-keeping: every method is one short unit of work, fenced by the attempt's token."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.orm import Session

from chunkplan.engine.spec import ScheduleSpec
from chunkplan.planner.catalog import find_gpu
from chunkplan.planner.spec import Peak, PlanRequest
from chunkplan.service.db import Database, take_in_turn
from chunkplan.service.db.tables import AttemptRow, JobRow, PlanRow, ProfileRow
from chunkplan.service.execution.executors.process_identity import ProcessIdentity
from chunkplan.service.execution.placement import Place
from chunkplan.service.execution.records.drift import bounds_of
from chunkplan.service.execution.records.ingest import Ingestion
from chunkplan.service.execution.records.messages import Batch
from chunkplan.service.execution.records.outcome import Ended, Outcome, decide
from chunkplan.service.execution.replanning import Planned, Replanned
from chunkplan.service.execution.repository import AttemptRepository
from chunkplan.service.job_states import JobState, Reason
from chunkplan.service.jobs.admission import shortfall_bytes, turn_at
from chunkplan.service.jobs.repository import JobRepository
from chunkplan.service.jobs.transitions import add_event, transition
from chunkplan.service.kit.clock import Clock
from chunkplan.service.kit.ids import new_id
from chunkplan.service.machines.devices import Device
from chunkplan.service.profiles.service import add_profile
from chunkplan.service.profiles.usage import UsageBook
from chunkplan.service.settings import Settings


class StaleToken(Exception):
    """The attempt has ended, or somebody else looks after it: nothing was written."""


@dataclass(frozen=True)
class Handle:
    """An attempt as its supervisor holds it."""

    attempt_id: str
    job_id: str
    number: int
    token: str
    device: str

    @classmethod
    def of(cls, row: AttemptRow) -> Handle:
        """The handle of a stored attempt."""
        return cls(row.id, row.job_id, row.number, row.token, row.device)


@dataclass(frozen=True)
class Claimed:
    """A job that has just been given to a device."""

    handle: Handle
    run_spec: dict[str, Any]
    upper_bytes: int


@dataclass(frozen=True)
class Unchecked:
    """The job whose turn it is, before anybody has looked whether its plan is up to date."""

    job_id: str


@dataclass(frozen=True)
class Finish:
    """What became of a job, for whoever counts."""

    outcome: Outcome
    profile: ProfileRow | None


class Ledger:
    """Reads and writes what a supervisor knows."""

    def __init__(self, database: Database, settings: Settings, clock: Clock, owner: str) -> None:
        self._database = database
        self._settings = settings
        self._clock = clock
        self._owner = owner
        self._host = ProcessIdentity.parse(owner).host

    def order_queue(self) -> None:
        """Puts jobs where the settings want them: what a point of priority is worth may have changed."""
        with self._database.write() as session:
            for job in JobRepository(session).unfinished_with_priority():
                job.turn_at = turn_at(job.created_at, job.priority, self._settings.priority_point_seconds)

    def claim(
        self,
        device: Device,
        devices: Sequence[Device] = (),
        *,
        passing_over: Collection[str] = (),
        is_current: Callable[[str, str, Device], bool] | None = None,
    ) -> Claimed | Unchecked | None:
        """Gives the job whose turn it is to a device that has room for it; what can never fit is rejected.

        Room is counted and taken in one unit of work, in which no other supervisor of this host gets to do
        the same.

        Args:
            device: one of this host.
            devices: all of this host, for a job may wait for another one.
            passing_over: jobs that are not for this device now.
            is_current: whether a job's plan was found to be up to date (job, plan, device); by default all
                are.

        Returns:
            `Unchecked`, and nothing is changed, when the plan of the job whose turn it is was not.
        """
        now = self._clock.now()
        with self._database.write() as session:
            take_in_turn(session, f"devices of {self._host}")
            jobs, attempts = JobRepository(session), AttemptRepository(session)
            place = Place(device, devices or [device], attempts.loads(self._host), passing_over)
            waiting = place.next_job(jobs, now, timedelta(seconds=self._settings.retry_delay_seconds))
            job = None if waiting is None else jobs.take_queued(waiting.id)
            if job is None:
                return None
            if is_current is not None and (job.replan is not None or not is_current(job.id, job.plan_id, device)):
                return Unchecked(job.id)
            missing = shortfall_bytes(job.upper_bytes, device.memory_bytes)
            if missing > 0:
                detail = f"the plan needs up to {job.upper_bytes} bytes, {missing} more than {device.name} has"
                transition(session, job, JobState.REJECTED, Reason.DOES_NOT_FIT, now=now, detail=detail)
                return None
            job.num_attempts += 1
            peak = Peak.model_validate(session.get_one(PlanRow, job.plan_id).plan["peak"])
            attempt = self._attempt(job, device, bounds_of(peak, job.extra_bytes, device.kind), now)
            attempts.add(attempt)
            transition(session, job, JobState.STARTING, Reason.ADMITTED, now=now, attempt_id=attempt.id)
            return Claimed(Handle.of(attempt), job.run_spec | {"device": device.engine_name}, job.upper_bytes)

    def planned(self, job_id: str) -> Planned:
        """A job beside its plan."""
        with self._database.read() as session:
            job = JobRepository(session).get(job_id)
            plan = session.get_one(PlanRow, job.plan_id).plan
            return Planned(
                job_id=job.id,
                project=job.project,
                plan_id=job.plan_id,
                request=PlanRequest.model_validate(plan["request"]),
                gpu=job.request.get("gpu"),
                schedule=ScheduleSpec.model_validate(job.run_spec["training"]["schedule"]),
                upper_bytes=job.upper_bytes,
                extra_bytes=job.extra_bytes,
                has_checkpoint=AttemptRepository(session).has_checkpoint(job_id),
                replan=job.replan,
            )

    def replan(self, found: Replanned, devices: Sequence[Device]) -> bool:
        """Gives a queued job its new plan, and says so; what has none, or fits nowhere with it, is rejected.

        Args:
            found: its plan, or why it has none.
            devices: where it may go instead, as far as anybody knows.

        Returns:
            False, and nothing is changed, when another device can hold the job and this one, with this plan,
            cannot.
        """
        now = self._clock.now()
        with self._database.write() as session:
            job = JobRepository(session).take_queued(found.job.job_id)
            if job is None or job.plan_id != found.job.plan_id:
                return True  # meanwhile it was paused, cancelled, or planned anew by another server
            if found.plan is None:
                if found.refusal is None:
                    job.not_before = now + timedelta(seconds=self._settings.retry_delay_seconds)
                else:
                    job.field = found.field
                    transition(session, job, JobState.REJECTED, found.refusal, now=now, detail=found.detail)
                return True
            plan, device = found.plan, found.device
            room = min(plan.capacity_bytes, device.memory_bytes - job.extra_bytes)
            missing = shortfall_bytes(plan.peak.upper_bytes, room)
            others = [other for other in devices if job.device in other.names and other != device]
            if missing > 0 and any(job.upper_bytes <= other.memory_bytes for other in others):
                return False
            before = {"from_plan_id": job.plan_id, "from_upper_bytes": job.upper_bytes}
            training = job.run_spec["training"] | {"schedule": plan.schedule.model_dump(mode="json")}
            is_other = training["schedule"] != job.run_spec["training"]["schedule"]
            job.run_spec = job.run_spec | {"training": training, "predicted_peak_bytes": plan.peak.allocated_bytes}
            job.plan_id, job.upper_bytes, job.replan = plan.id, plan.peak.upper_bytes + job.extra_bytes, None
            job.gpu = find_gpu(plan.request.gpu).name
            data = before | {"reason": found.why, "device": device.name, "plan_id": job.plan_id}
            data |= {"upper_bytes": job.upper_bytes, "schedule": training["schedule"] if is_other else None}
            add_event(session, job, "replanned", data, now=now)
            if missing > 0:
                detail = f"planned anew, it needs up to {job.upper_bytes} bytes, {missing} more than {device.name} has"
                transition(session, job, JobState.REJECTED, Reason.DOES_NOT_FIT, now=now, detail=detail)
            return True

    def reject(self, job_id: str, reason: Reason, detail: str) -> None:
        """Rejects a queued job."""
        with self._database.write() as session:
            job = JobRepository(session).take_queued(job_id)
            if job is not None:
                transition(session, job, JobState.REJECTED, reason, now=self._clock.now(), detail=detail[:1000])

    def record_process(self, handle: Handle, process: str) -> None:
        """Remembers which process runs an attempt.

        Raises:
            StaleToken: see there.
        """
        with self._database.write() as session:
            self._fenced(AttemptRepository(session), handle, {"process": process})

    def ingest(self, handle: Handle, batch: Batch, offset: int) -> bool:
        """Writes messages and the new offset together: each message is written exactly once.

        Returns:
            Whether the attempt has risen above its plan's bounds, for the first time.

        Raises:
            StaleToken: see there; also when the batch was read from another offset than the stored one.
        """
        with self._database.write() as session:
            job = JobRepository(session).lock(handle.job_id)
            attempts = AttemptRepository(session)
            self._fenced(attempts, handle, {"events_offset": batch.next_offset}, at_offset=offset)
            attempt = attempts.get(handle.attempt_id)
            has_drifted = attempt.drift_bytes is not None
            ingestion = Ingestion(session, job, handle.attempt_id, {} if has_drifted else attempt.bounds or {})
            for message in batch.messages:
                ingestion.add(message)
            if ingestion.attempt_values:
                self._fenced(attempts, handle, ingestion.attempt_values)
            return "drift_bytes" in ingestion.attempt_values

    def finish(
        self, handle: Handle, exit_code: int | None, *, last_words: str | None = None, server_stopping: bool = False
    ) -> Finish:
        """Ends an attempt, decides what becomes of its job, and profiles a job that has succeeded.

        Raises:
            StaleToken: see there.
        """
        now = self._clock.now()
        with self._database.write() as session:
            job = JobRepository(session).lock(handle.job_id)
            attempts = AttemptRepository(session)
            attempt = attempts.get(handle.attempt_id)
            ended = Ended(
                exit_code=exit_code,
                finished_reason=attempt.finished_reason,
                failed_reason=attempt.failed_reason,
                failed_detail=attempt.failed_detail,
                made_progress=(attempt.checkpoint_step or 0) > (attempt.resumed_step or 0),
                last_words=last_words,
                server_stopping=server_stopping,
                ran_out_before=job.num_out_of_memory > 0,
            )
            outcome = decide(job.state, ended, job.num_failures, self._settings.max_attempts)
            self._fenced(attempts, handle, {"ended_at": now, "exit_code": exit_code, "reason": outcome.reason})
            UsageBook(session, job).add_attempt(attempt.created_at, now)
            job.num_failures = outcome.num_failures
            if outcome.out_of_memory:
                job.num_out_of_memory += 1
            if outcome.out_of_memory and not outcome.state.is_final:
                job.replan = Reason.OUT_OF_MEMORY.value
                extra_bytes = self._excess(session, job, attempt)
                job.upper_bytes += extra_bytes - job.extra_bytes
                job.extra_bytes = extra_bytes
            job.not_before = now + timedelta(seconds=self._settings.retry_delay_seconds if outcome.delayed else 0)
            profile = None
            if outcome.state is JobState.SUCCEEDED:
                profile = add_profile(session, job, handle.device, now)
            transition(
                session, job, outcome.state, outcome.reason, now=now, detail=outcome.detail, attempt_id=attempt.id
            )
            return Finish(outcome, profile)

    def renew(self, attempt_ids: Collection[str]) -> set[str]:
        """Extends leases; returns the attempts that still are this server's."""
        with self._database.write() as session:
            return AttemptRepository(session).renew(self._owner, attempt_ids, self._lease())

    def offset(self, handle: Handle) -> int:
        """Up to where an attempt's event file is in the database."""
        with self._database.read() as session:
            return AttemptRepository(session).get(handle.attempt_id).events_offset

    def open_attempts(self) -> list[AttemptRow]:
        """Attempts that have not ended, anybody's."""
        with self._database.read() as session:
            return AttemptRepository(session).open()

    def states(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """The states of some jobs."""
        with self._database.read() as session:
            return JobRepository(session).states(job_ids)

    @staticmethod
    def _excess(session: Session, job: JobRow, attempt: AttemptRow) -> int:
        """By how much what an attempt held, and asked for at its end, was above its plan: the margin stays on
        top.
        """
        peak = session.get_one(PlanRow, job.plan_id).plan["peak"]
        context_bytes = 0 if attempt.device.startswith("cpu") else peak["device_bytes"] - peak["reserved_bytes"]
        return max(0, (attempt.needed_bytes or 0) + context_bytes - peak["device_bytes"])

    def _attempt(self, job: JobRow, device: Device, bounds: dict[str, int], now: datetime) -> AttemptRow:
        return AttemptRow(
            id=new_id("att", now),
            job_id=job.id,
            number=job.num_attempts,
            token=secrets.token_hex(16),
            owner=self._owner,
            host=self._host,
            device=device.name,
            upper_bytes=job.upper_bytes,
            bounds=bounds,
            lease_expires_at=self._lease(),
            events_offset=0,
            created_at=now,
        )

    def _lease(self) -> datetime:
        return self._clock.now() + timedelta(seconds=self._settings.lease_seconds)

    @staticmethod
    def _fenced(
        attempts: AttemptRepository, handle: Handle, values: dict[str, Any], *, at_offset: int | None = None
    ) -> None:
        if not attempts.fenced_update(handle.attempt_id, handle.token, values, at_offset=at_offset):
            raise StaleToken(handle.attempt_id)
