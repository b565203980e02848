"""What must hold after `benchmarks.chaos`: of the database, of the trainers' own files, of what users were
told.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from chunkplan.service.db import Database
from chunkplan.service.db.check import check
from chunkplan.service.db.tables import ArtifactRow, AttemptRow, CheckpointRow, EventRow, JobRow, MetricRow, SampleRow
from chunkplan.service.job_states import TRANSITIONS, JobState

_NOT_IN_EVENTS = {"type", "time"}


@dataclass(frozen=True)
class Asked:
    """A job as its user knows it."""

    job_id: str
    deed: str
    cancelled: bool
    """Whether the user was told that it will be cancelled."""
    state: str
    """The last one that the user saw."""
    seen: list[tuple[int, str]] | None
    """Number and type of each event that a stream brought; None when nobody listened."""


@dataclass
class Checked:
    """What was found."""

    violations: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


def find_violations(database_url: str, data_dir: Path, asked: Sequence[Asked], max_steps: int) -> Checked:
    """Looks at everything; the service has been stopped."""
    database, checked = Database(database_url), Checked()
    counts: Counter[str] = Counter()
    weights: dict[str, list[str]] = {}
    with database.engine.connect() as connection:
        for finding in check(connection):
            checked.violations += [f"database, {finding.check}: {problem}" for problem in finding.problems]
    with database.read() as session:
        jobs = {job.id: job for job in session.scalars(select(JobRow))}
        for job_id in jobs.keys() ^ {one.job_id for one in asked}:
            checked.violations.append(f"{job_id}: is {'not ' if job_id not in jobs else ''}stored, but its user ...")
        tokens = Counter(session.scalars(select(AttemptRow.token)))
        checked.violations += [
            f"token {token} belongs to {count} attempts" for token, count in tokens.items() if count > 1
        ]
        for one in asked:
            job = _Job(session, jobs[one.job_id], data_dir / "jobs" / one.job_id, max_steps)
            checked.violations += [f"{one.job_id} ({one.deed}): {line}" for line in (*job.problems(), *_told(job, one))]
            counts.update(job.counts)
            counts[f"jobs {job.row.state}"] += 1
            counts["events seen by listeners"] += len(one.seen or [])
            counts["listeners"] += one.seen is not None
            if job.row.state is JobState.SUCCEEDED:
                weights.setdefault(job.weights(), []).append(one.job_id)
    if len(weights) > 1:
        checked.violations.append(f"weights differ: {sorted(weights.values(), key=len)[:-1]} from the other jobs'")
    database.dispose()
    checked.figures = dict(sorted(counts.items())) | {"different weights": len(weights)}
    return checked


def _told(job: _Job, asked: Asked) -> Iterator[str]:
    """What users were told against what is so."""
    expected = {"cancelled"} if asked.cancelled else {"succeeded"}
    if job.row.state.value not in expected or asked.state not in expected:
        detail = f"{job.row.reason}: {job.row.detail}"
        yield f"is {job.row.state} ({detail}), its user saw {asked.state} and expects {expected}"
    if asked.seen is not None:
        numbers = [number for number, _ in asked.seen]
        if numbers != list(range(1, job.row.last_event + 1)):
            yield f"its listener saw {_holes(numbers)} of {job.row.last_event} events"
        if [kind for _, kind in asked.seen] != [event.type for event in job.events]:
            yield "its listener saw other events than are stored"


class _Job:
    """One job with all its rows and files."""

    def __init__(self, session: Session, row: JobRow, folder: Path, max_steps: int) -> None:
        def all_of(table: Any, order: Any) -> list[Any]:
            return list(session.scalars(select(table).where(table.job_id == row.id).order_by(order)))

        self.row = row
        self._folder = folder
        self._max_steps = max_steps
        self.events: list[EventRow] = all_of(EventRow, EventRow.number)
        self.attempts: list[AttemptRow] = all_of(AttemptRow, AttemptRow.number)
        self._metrics: list[MetricRow] = all_of(MetricRow, MetricRow.id)
        self._checkpoints: list[CheckpointRow] = all_of(CheckpointRow, CheckpointRow.created_at)
        self._artifacts: list[ArtifactRow] = all_of(ArtifactRow, ArtifactRow.name)
        samples = select(SampleRow.attempt_id, func.count()).where(SampleRow.job_id == row.id)
        self._num_samples = dict(session.execute(samples.group_by(SampleRow.attempt_id)).all())
        self._spans: list[tuple[datetime, datetime, int]] = []
        self.counts: Counter[str] = Counter(
            attempts=len(self.attempts), events=len(self.events), checkpoints=len(self._checkpoints)
        )

    def problems(self) -> Iterator[str]:
        yield from self._event_numbers()
        yield from self._states()
        for attempt in self.attempts:
            yield from self._attempt(attempt)
        yield from self._order_of_attempts()
        yield from self._lineage()
        if self.row.state is JobState.SUCCEEDED:
            yield from self._result()

    def weights(self) -> str:
        """Digest of the exported weights."""
        return "/".join(row.sha256 for row in self._artifacts if row.name.endswith(".safetensors"))

    def _event_numbers(self) -> Iterator[str]:
        numbers = [event.number for event in self.events]
        if numbers != list(range(1, self.row.last_event + 1)):
            yield f"events are numbered {_holes(numbers)}, the job says up to {self.row.last_event}"

    def _states(self) -> Iterator[str]:
        """Each change of state begins where the last one ended, is allowed, and the last is the job's."""
        changes = [event.data for event in self.events if event.type == "state"]
        for earlier, later in pairwise(changes):
            if later["from"] != earlier["state"]:
                yield f"became {earlier['state']}, and then went from {later['from']} to {later['state']}"
            elif JobState(later["state"]) not in TRANSITIONS[JobState(later["from"])]:
                yield f"went from {later['from']} to {later['state']}"
        if changes[-1]["state"] != self.row.state or not self.row.state.is_final:
            yield f"is {self.row.state}, its events say {changes[-1]['state']}"
        if self.events[-1].type != "state":
            yield f"a {self.events[-1].type} event comes after its end"

    def _attempt(self, attempt: AttemptRow) -> Iterator[str]:
        """Every line of a trainer's file is one event, in order, with all it said; and there are
        no others.
        """
        name = f"attempt {attempt.number}"
        if attempt.ended_at is None or attempt.reason is None:
            yield f"{name} has not ended"
        path = self._folder / "attempts" / str(attempt.number) / "events.jsonl"
        content = path.read_bytes() if path.exists() else b""
        end = content.rfind(b"\n") + 1
        if attempt.events_offset != end:
            yield f"{name}: {attempt.events_offset} bytes of {end} are in the database"
        if end != len(content):
            self.counts["torn last lines"] += 1
        lines = [json.loads(line) for line in content[:end].splitlines()]
        self.counts["trainers' lines"] += len(lines)
        stored = [event for event in self.events if event.attempt_id == attempt.id and event.type != "state"]
        if [_said(line) for line in lines] != [_stored(event) for event in stored]:
            yield f"{name}: {len(lines)} lines were reported, {len(stored)} events are stored, and they differ"
        steps = [line for line in lines if line["type"] == "step"]
        metrics = [row for row in self._metrics if row.attempt_id == attempt.id and row.kind == "train"]
        if [(line["step"], line["loss"]) for line in steps] != [(row.step, row.loss) for row in metrics]:
            yield f"{name}: reported steps {[line['step'] for line in steps]}, has {[row.step for row in metrics]}"
        if sum(len(line["samples"]) for line in steps) != self._num_samples.get(attempt.id, 0):
            yield f"{name}: {self._num_samples.get(attempt.id, 0)} samples are stored, not as many as were reported"
        if lines:
            self._spans.append((_time(lines[0]), _time(lines[-1]), attempt.number))

    def _order_of_attempts(self) -> Iterator[str]:
        """One after the other, by the trainers' own clocks and by the database."""
        if [attempt.number for attempt in self.attempts] != list(range(1, self.row.num_attempts + 1)):
            yield f"attempts are numbered {[attempt.number for attempt in self.attempts]} of {self.row.num_attempts}"
        for (_, end, first), (begin, _, second) in pairwise(self._spans):
            if begin < end:
                yield f"attempt {second} reported at {begin}, attempt {first} still at {end}"
        for earlier, later in pairwise(self.attempts):
            if earlier.ended_at is None or later.created_at < earlier.ended_at:
                yield f"attempt {later.number} began before attempt {earlier.number} had ended"

    def _lineage(self) -> Iterator[str]:
        """The loss curve holds each step once, and every attempt began where an earlier one had been.

        A trainer that is killed between saving a checkpoint and reporting it leaves one that is whole and
        resumed from.
        """
        steps = [row.step for row in self._metrics if row.kind == "train" and not row.superseded]
        self.counts["steps"] += len(steps)
        self.counts["steps taken again"] += sum(row.kind == "train" and row.superseded for row in self._metrics)
        is_whole = self.row.state is JobState.SUCCEEDED
        if steps != list(range(1, self._max_steps + 1 if is_whole else len(steps) + 1)):
            yield f"its loss curve has {_holes(steps)}"
        reached, saved = 0, {0}
        for attempt in self.attempts:
            resumed = attempt.resumed_step or 0
            if resumed > reached:
                yield f"attempt {attempt.number} began at step {resumed}, nobody had got beyond {reached}"
            self.counts["attempts that resumed"] += resumed > 0
            self.counts["of them from a checkpoint that was not reported yet"] += resumed not in saved
            reached = max(reached, attempt.last_step or 0)
            saved |= {row.step for row in self._checkpoints if row.attempt_id == attempt.id}

    def _result(self) -> Iterator[str]:
        if not self._artifacts:
            yield "left no artifacts"
        for row in self._artifacts:
            path = self._folder / row.path
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != row.sha256:
                yield f"artifact {row.name} is not what was recorded"
        if (self._folder / "checkpoints").exists():
            yield "its checkpoints were not removed"


def _said(line: dict[str, Any]) -> tuple[str, datetime, dict[str, Any]]:
    left_out = _NOT_IN_EVENTS | ({"samples"} if line["type"] == "step" else set())
    said = {name: value for name, value in line.items() if name not in left_out and value is not None}
    return line["type"], _time(line), said


def _stored(event: EventRow) -> tuple[str, datetime, dict[str, Any]]:
    return event.type, event.created_at, {name: value for name, value in event.data.items() if value is not None}


def _time(line: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(line["time"])


def _holes(numbers: list[int]) -> str:
    """The numbers as runs: 1-7, 9-12."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" for first, last in runs) or "nothing"
