"""Rollups for dashboards: highest bytes per step, usage per job and day, residuals per profile and phase.

What was stored before is added up once, here: that takes a while where there are millions of samples.

Revision ID: 0003
Revises: 0002
Create Date: 2026-11-23 05:50:00
"""

import json
import math
from datetime import UTC, datetime, time, timedelta
from statistics import fmean

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

GROUPS = ["project", "phase", "model", "gpu", "bucket", "day"]
GROUPS += ["mean_error", "min_error", "mean_absolute_error", "max_absolute_error"]
BYTES = ("allocated_bytes", "reserved_bytes", "host_bytes")


def upgrade() -> None:
    for name in BYTES:
        op.add_column("metrics", sa.Column(name, sa.BigInteger(), nullable=True))
    op.create_table(
        "job_days",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("num_steps", sa.BigInteger(), nullable=False),
        sa.Column("num_tokens", sa.BigInteger(), nullable=False),
        sa.Column("train_seconds", sa.Double(), nullable=False),
        sa.Column("device_seconds", sa.Double(), nullable=False),
        sa.Column("measured_seconds", sa.Double(), nullable=False),
        sa.Column("planned_byte_seconds", sa.Double(), nullable=False),
        sa.Column("measured_byte_seconds", sa.Double(), nullable=False),
        sa.Column("measured_peak_bytes", sa.BigInteger(), nullable=False),
        sa.Column("project", sa.String(length=256), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_days_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", "day", name=op.f("pk_job_days")),
    )
    op.create_table(
        "profile_phases",
        sa.Column("profile_id", sa.String(length=64), nullable=False),
        sa.Column("phase", sa.String(length=256), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("model", sa.String(length=4096), nullable=False),
        sa.Column("gpu", sa.String(length=256), nullable=False),
        sa.Column("num_chunks", sa.BigInteger(), nullable=False),
        sa.Column("mean_error", sa.Double(), nullable=False),
        sa.Column("min_error", sa.Double(), nullable=False),
        sa.Column("mean_absolute_error", sa.Double(), nullable=False),
        sa.Column("max_absolute_error", sa.Double(), nullable=False),
        sa.Column("bucket", sa.BigInteger(), nullable=False),
        sa.Column("project", sa.String(length=256), nullable=False),
        sa.ForeignKeyConstraint(["profile_id"], ["profiles.id"], name=op.f("fk_profile_phases_profile_id_profiles")),
        sa.PrimaryKeyConstraint("profile_id", "phase", name=op.f("pk_profile_phases")),
    )
    connection = op.get_bind()
    _add_up_steps(connection)
    _add_up_days(connection)
    _add_up_residuals(connection)
    op.create_index(op.f("ix_job_days_project_day"), "job_days", ["project", "day"])
    op.create_index("ix_profile_phases_groups", "profile_phases", GROUPS)
    op.create_index(op.f("ix_jobs_project_finished_at_id"), "jobs", ["project", "finished_at", "id"])
    op.create_index(op.f("ix_jobs_finished_at_id"), "jobs", ["finished_at", "id"])
    op.create_index(op.f("ix_profiles_created_at_id"), "profiles", ["created_at", "id"])
    op.create_index(op.f("ix_jobs_project_state_created_at"), "jobs", ["project", "state", "created_at"])
    op.drop_index(op.f("ix_jobs_project_state"), table_name="jobs")


def downgrade() -> None:
    op.create_index(op.f("ix_jobs_project_state"), "jobs", ["project", "state"])
    op.drop_index(op.f("ix_jobs_project_state_created_at"), table_name="jobs")
    op.drop_index(op.f("ix_profiles_created_at_id"), table_name="profiles")
    op.drop_index(op.f("ix_jobs_finished_at_id"), table_name="jobs")
    op.drop_index(op.f("ix_jobs_project_finished_at_id"), table_name="jobs")
    op.drop_table("profile_phases")
    op.drop_table("job_days")
    for name in reversed(BYTES):
        op.drop_column("metrics", name)


def _add_up_steps(connection: sa.Connection) -> None:
    connection.execute(
        sa.text(
            "CREATE TEMPORARY TABLE step_peaks AS SELECT attempt_id, step, max(allocated_bytes) AS allocated_bytes, "
            "max(reserved_bytes) AS reserved_bytes, max(host_bytes) AS host_bytes "
            "FROM profile_samples GROUP BY attempt_id, step"
        )
    )
    connection.execute(sa.text("CREATE INDEX step_peaks_step ON step_peaks (attempt_id, step)"))
    connection.execute(
        sa.text(
            "UPDATE metrics SET allocated_bytes = step_peaks.allocated_bytes, "
            "reserved_bytes = step_peaks.reserved_bytes, host_bytes = step_peaks.host_bytes FROM step_peaks "
            "WHERE metrics.kind = 'train' AND step_peaks.attempt_id = metrics.attempt_id "
            "AND step_peaks.step = metrics.step"
        )
    )
    connection.execute(sa.text("DROP TABLE step_peaks"))


def _add_up_days(connection: sa.Connection) -> None:
    day = "date(metrics.created_at)" if connection.dialect.name == "sqlite" else "CAST(metrics.created_at AS date)"
    measured = "CASE WHEN allocated_bytes IS NULL THEN 0 ELSE coalesce(seconds, 0) END"
    connection.execute(
        sa.text(
            "INSERT INTO job_days (job_id, day, project, num_steps, num_tokens, train_seconds, device_seconds, "  # noqa: S608
            "measured_seconds, planned_byte_seconds, measured_byte_seconds, measured_peak_bytes) "
            f"SELECT metrics.job_id, {day}, jobs.project, count(*), sum(num_tokens), sum(coalesce(seconds, 0)), 0, "
            f"sum({measured}), sum(1.0 * plans.upper_bytes * {measured}), "
            f"sum(1.0 * coalesce(allocated_bytes, 0) * {measured}), max(coalesce(allocated_bytes, 0)) "
            "FROM metrics JOIN jobs ON jobs.id = metrics.job_id JOIN plans ON plans.id = jobs.plan_id "
            f"WHERE kind = 'train' GROUP BY metrics.job_id, {day}, jobs.project"
        )
    )
    days = _table(connection, "job_days")
    attempts, jobs = _table(connection, "attempts"), _table(connection, "jobs")
    held: dict = {}
    statement = (
        sa.select(jobs.c.id, jobs.c.project, attempts.c.created_at, attempts.c.ended_at)
        .join(jobs, jobs.c.id == attempts.c.job_id)
        .where(attempts.c.ended_at.is_not(None))
    )
    for job_id, project, start, end in connection.execute(statement):
        for on, seconds in _seconds_by_day(_utc(start), _utc(end)):
            held[job_id, on] = (project, held.get((job_id, on), (project, 0.0))[1] + seconds)
    known = {(job_id, on) for job_id, on in connection.execute(sa.select(days.c.job_id, days.c.day))}
    numbers = [column.name for column in days.c if column.name not in {"job_id", "day", "project"}]
    new = [
        dict.fromkeys(numbers, 0) | {"job_id": key[0], "day": key[1], "project": project}
        for key, (project, _) in held.items()
        if key not in known
    ]
    if new:
        connection.execute(sa.insert(days), new)
    if held:
        update = (
            sa.update(days)
            .where(days.c.job_id == sa.bindparam("of_job"), days.c.day == sa.bindparam("on_day"))
            .values(device_seconds=sa.bindparam("seconds"))
        )
        connection.execute(
            update, [{"of_job": key[0], "on_day": key[1], "seconds": held_for} for key, (_, held_for) in held.items()]
        )


def _add_up_residuals(connection: sa.Connection) -> None:
    profiles, phases = _table(connection, "profiles"), _table(connection, "profile_phases")
    wanted = [profiles.c[name] for name in ("id", "project", "model", "gpu", "created_at", "residuals")]
    last = ""
    while found := connection.execute(
        sa.select(*wanted).where(profiles.c.id > last).order_by(profiles.c.id).limit(200)
    ).all():
        rows = [row for profile in found for row in _phases(profile)]
        if rows:
            connection.execute(sa.insert(phases), rows)
        last = found[-1].id


def _phases(profile: sa.Row) -> list[dict]:
    residuals = json.loads(profile.residuals) if isinstance(profile.residuals, str) else profile.residuals
    errors: dict[str, list[float]] = {}
    for residual in residuals:
        errors.setdefault(residual["phase"], []).append(residual["relative_error"])
    return [
        {
            "profile_id": profile.id,
            "project": profile.project,
            "phase": phase,
            "day": _utc(profile.created_at).date(),
            "model": profile.model,
            "gpu": profile.gpu,
            "num_chunks": len(found),
            "mean_error": fmean(found),
            "min_error": min(found),
            "mean_absolute_error": fmean(map(abs, found)),
            "max_absolute_error": max(map(abs, found)),
            "bucket": _bucket(max(map(abs, found))),
        }
        for phase, found in errors.items()
    ]


def _bucket(magnitude: float) -> int:
    return 0 if magnitude <= 1e-6 else min(math.ceil(math.log(magnitude / 1e-6, 1.04)), 1000)


def _seconds_by_day(start: datetime, end: datetime):
    while start < end:
        until = min(end, datetime.combine(start.date() + timedelta(days=1), time(), UTC))
        yield start.date(), (until - start).total_seconds()
        start = until


def _utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _table(connection: sa.Connection, name: str) -> sa.Table:
    return sa.Table(name, sa.MetaData(), autoload_with=connection)
