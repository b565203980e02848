"""One Alembic chain for both databases."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, inspect, select, text

from chunkplan.service.db import Database, current_revision, downgrade, head_revision, upgrade
from chunkplan.service.db.base import Base
from chunkplan.service.db.check import check
from chunkplan.service.db.tables import (
    AttemptRow,
    EventRow,
    FileRow,
    JobDayRow,
    JobRow,
    MetricRow,
    PlanRow,
    PlanUseRow,
    ProfilePhaseRow,
)
from chunkplan.service.profiles.percentiles import bucket_of


def test_upgrade_creates_exactly_the_tables_of_the_models(empty_database_url):
    upgrade(empty_database_url)
    engine = create_engine(empty_database_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        assert current_revision(connection) == head_revision()
    engine.dispose()


def test_upgrade_can_be_repeated(empty_database_url):
    upgrade(empty_database_url)
    upgrade(empty_database_url)


def test_downgrade_leaves_no_table_behind(empty_database_url):
    upgrade(empty_database_url)
    downgrade(empty_database_url)
    engine = create_engine(empty_database_url)
    assert set(inspect(engine).get_table_names()) == {"alembic_version"}
    engine.dispose()
    upgrade(empty_database_url)


def test_what_an_older_version_stored_is_kept_and_belongs_to_the_default_project(empty_database_url):
    upgrade(empty_database_url, "0001")
    engine = create_engine(empty_database_url)
    now = datetime(2026, 1, 1, tzinfo=UTC)
    plan = {"planner_version": "1", "model": "m", "gpu": "g", "method": "chunkft", "fits": True, "upper_bytes": 1}
    plan |= {"capacity_bytes": 1, "step_seconds": 1.0, "plan": "{}", "created_at": now}
    job = {"project": "default", "name": "n", "state": "queued", "reason": "submitted", "model": "m", "gpu": "g"}
    job |= {"device_kind": "cpu", "priority": 0, "plan_id": "plan_1", "request": "{}", "run_spec": "{}", "step": 0}
    job |= {"num_attempts": 0, "num_failures": 0, "last_event": 1, "created_at": now, "not_before": now}
    event = {"job_id": "job_1", "number": 1, "type": "state", "data": "{}", "created_at": now}
    file = {"project": "default", "filename": "f", "purpose": "fine-tune", "size_bytes": 1, "sha256": "0"}
    with engine.begin() as connection:
        insert(connection, "plans", {"id": "plan_1"} | plan)
        insert(connection, "jobs", {"id": "job_1"} | job)
        insert(connection, "events", event)
        insert(connection, "files", {"id": "file_1", "created_at": now} | file)
    engine.dispose()
    upgrade(empty_database_url)
    upgraded = Database(empty_database_url)
    with upgraded.of("default").read() as session:
        assert [session.get(row, f"{name}_1").id for row, name in KEPT] == ["plan_1", "job_1", "file_1"]
        assert session.scalar(select(EventRow.number)) == 1
        use = session.get(PlanUseRow, ("default", "plan_1"))
        assert (use.plan_id, use.created_at) == ("plan_1", now)
    with upgraded.of("other").read() as session:
        assert [session.get(row, f"{name}_1") for row, name in KEPT] == [None, None, None]
        assert session.scalar(select(EventRow.number)) is None
    upgraded.dispose()
    downgrade(empty_database_url, "0001")
    engine = create_engine(empty_database_url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT id, plan_id FROM jobs")).all() == [("job_1", "plan_1")]
    engine.dispose()


def test_what_was_measured_before_there_were_rollups_is_added_up(empty_database_url):
    upgrade(empty_database_url, "0002")
    engine = create_engine(empty_database_url)
    start, end = datetime(2026, 1, 1, 23, tzinfo=UTC), datetime(2026, 1, 2, 2, tzinfo=UTC)
    plan = {"id": "plan_1", "planner_version": "1", "model": "m", "gpu": "g", "method": "chunkft", "fits": True}
    plan |= {"upper_bytes": 1000, "capacity_bytes": 1, "step_seconds": 1.0, "plan": "{}", "created_at": start}
    job = {"id": "job_1", "project": "vision", "name": "n", "state": "succeeded", "reason": "completed", "model": "m"}
    job |= {"gpu": "g", "device_kind": "cpu", "priority": 0, "plan_id": "plan_1", "request": "{}", "run_spec": "{}"}
    job |= {"step": 2, "num_attempts": 1, "num_failures": 0, "last_event": 1, "created_at": start, "not_before": start}
    attempt = {"id": "att_1", "job_id": "job_1", "number": 1, "token": "t", "owner": "o", "device": "cpu"}
    attempt |= {"lease_expires_at": end, "events_offset": 0, "created_at": start, "ended_at": end}
    metric = {"job_id": "job_1", "attempt_id": "att_1", "kind": "train", "superseded": False, "num_tokens": 64}
    metric |= {"seconds": 2.0}
    sample = {"job_id": "job_1", "attempt_id": "att_1", "step": 1, "chunk_index": 0, "reserved_bytes": 5}
    sample |= {"host_bytes": 6, "seconds": 0.1, "created_at": start}
    errors = [("forward", 0.01), ("step", -0.02), ("step", 0.04)]
    residuals = [{"chunk_index": 0, "phase": phase, "relative_error": error} for phase, error in errors]
    profile = {"id": "prof_1", "project": "vision", "job_id": "job_1", "plan_id": "plan_1", "model": "m", "gpu": "g"}
    profile |= {"device": "cpu", "num_samples": 2, "predicted_peak_bytes": 1, "measured_peak_bytes": 1}
    profile |= {"predicted_step_seconds": 1.0, "residuals": json.dumps(residuals), "created_at": end}
    with engine.begin() as connection:
        insert(connection, "plans", plan)
        insert(connection, "jobs", job)
        insert(connection, "attempts", attempt)
        insert(connection, "metrics", metric | {"step": 1, "created_at": start})
        insert(connection, "metrics", metric | {"step": 2, "created_at": start})
        insert(connection, "profile_samples", sample | {"phase": "forward", "allocated_bytes": 300})
        insert(connection, "profile_samples", sample | {"phase": "backward", "allocated_bytes": 400})
        insert(connection, "profiles", profile)
    engine.dispose()
    upgrade(empty_database_url)
    upgraded = Database(empty_database_url)
    with upgraded.of("vision").read() as session:
        metrics = session.scalars(select(MetricRow).order_by(MetricRow.step)).all()
        assert [(row.allocated_bytes, row.reserved_bytes) for row in metrics] == [(400, 5), (None, None)]
        first, second = session.scalars(select(JobDayRow).order_by(JobDayRow.day)).all()
        assert (first.num_steps, first.num_tokens, first.train_seconds, first.device_seconds) == (2, 128, 4.0, 3600.0)
        assert (first.measured_seconds, first.planned_byte_seconds, first.measured_byte_seconds) == (2.0, 2000, 800)
        assert (first.day, second.day) == (start.date(), end.date())
        assert (second.num_steps, second.device_seconds, first.measured_peak_bytes) == (0, 7200.0, 400)
        forward, step = session.scalars(select(ProfilePhaseRow).order_by(ProfilePhaseRow.phase)).all()
        assert (forward.phase, forward.num_chunks, forward.bucket) == ("forward", 1, bucket_of(0.01))
        assert (step.num_chunks, step.min_error, step.max_absolute_error) == (2, -0.02, 0.04)
        assert (step.mean_error, step.day, step.bucket) == (pytest.approx(0.01), end.date(), bucket_of(0.04))
    with upgraded.engine.connect() as connection:
        assert [finding for finding in check(connection) if finding.problems] == []
    upgraded.dispose()
    downgrade(empty_database_url, "0002")
    upgrade(empty_database_url)


def test_queued_jobs_keep_their_order_and_attempts_their_host(empty_database_url):
    upgrade(empty_database_url, "0003")
    engine = create_engine(empty_database_url)
    now = datetime(2026, 1, 1, 12, tzinfo=UTC)
    plan = {"id": "plan_1", "planner_version": "1", "model": "m", "gpu": "g", "method": "chunkft", "fits": True}
    plan |= {"upper_bytes": 1000, "capacity_bytes": 1, "step_seconds": 1.0, "plan": "{}", "created_at": now}
    job = {"project": "default", "name": "n", "state": "queued", "reason": "submitted", "model": "m", "gpu": "g"}
    job |= {"device_kind": "cuda", "plan_id": "plan_1", "request": "{}", "run_spec": "{}", "step": 0}
    job |= {"num_attempts": 1, "num_failures": 0, "last_event": 1, "created_at": now, "not_before": now}
    attempt = {"id": "att_1", "job_id": "job_1", "number": 1, "token": "t", "owner": "box/12/1.5", "device": "cuda:0"}
    attempt |= {"lease_expires_at": now, "events_offset": 0, "created_at": now}
    with engine.begin() as connection:
        insert(connection, "plans", plan)
        insert(connection, "jobs", job | {"id": "job_1", "priority": 0})
        insert(connection, "jobs", job | {"id": "job_2", "priority": 2})
        insert(connection, "attempts", attempt)
    engine.dispose()
    upgrade(empty_database_url)
    upgraded = Database(empty_database_url)
    with upgraded.read() as session:
        queue = session.scalars(select(JobRow).order_by(JobRow.turn_at)).all()
        assert [(row.id, row.turn_at) for row in queue] == [("job_2", now - timedelta(hours=2)), ("job_1", now)]
        assert {(row.device, row.upper_bytes) for row in queue} == {("cuda", 1000)}
        (stored,) = session.scalars(select(AttemptRow))
        assert (stored.host, stored.device, stored.upper_bytes) == ("box", "cuda:0", 1000)
    upgraded.dispose()
    downgrade(empty_database_url, "0003")
    engine = create_engine(empty_database_url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT DISTINCT device_kind FROM jobs")).all() == [("cuda",)]
    engine.dispose()


KEPT = [(PlanRow, "plan"), (JobRow, "job"), (FileRow, "file")]


def insert(connection, table, values):
    """A row as an older version wrote it: today's tables do not know its columns."""
    names = ", ".join(values)
    connection.execute(text(f"INSERT INTO {table} ({names}) VALUES (:{', :'.join(values)})"), values)


def test_every_constraint_has_the_conventional_name(empty_database_url):
    upgrade(empty_database_url)
    engine = create_engine(empty_database_url)
    inspector = inspect(engine)
    for table in Base.metadata.tables:
        assert inspector.get_pk_constraint(table)["name"] == f"pk_{table}"
        assert all(key["name"].startswith(f"fk_{table}_") for key in inspector.get_foreign_keys(table))
        assert all(key["name"].startswith(f"uq_{table}_") for key in inspector.get_unique_constraints(table))
        assert all(index["name"].startswith((f"ix_{table}_", f"uq_{table}_")) for index in inspector.get_indexes(table))
    engine.dispose()
