"""Several devices per host, shared where bounds fit together; whose turn it is, by age and priority.

Revision ID: 0004
Revises: 0003
Create Date: 2026-11-23 08:20:00
"""

from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

POINT_SECONDS = 3600.0
"""What a point of priority is worth by default; a server with another setting puts its queue in order at its start."""
QUEUE = ["state", "device", "turn_at", "id", "upper_bytes"]


def upgrade() -> None:
    op.drop_index(op.f("ix_jobs_state_priority_created_at"), table_name="jobs")
    op.execute("ALTER TABLE jobs RENAME COLUMN device_kind TO device")
    _add("jobs", "turn_at", sa.DateTime(timezone=True), "1970-01-01 00:00:00")
    _add("jobs", "upper_bytes", sa.BigInteger(), "0")
    _add("attempts", "host", sa.String(length=256), "")
    _add("attempts", "upper_bytes", sa.BigInteger(), "0")
    connection = op.get_bind()
    op.execute("UPDATE jobs SET turn_at = created_at")
    _set_turns(connection)
    op.execute("UPDATE jobs SET upper_bytes = (SELECT upper_bytes FROM plans WHERE plans.id = jobs.plan_id)")
    op.execute("UPDATE attempts SET upper_bytes = (SELECT upper_bytes FROM jobs WHERE jobs.id = attempts.job_id)")
    is_sqlite = connection.dialect.name == "sqlite"
    host = "substr(owner, 1, instr(owner || '/', '/') - 1)" if is_sqlite else "split_part(owner, '/', 1)"
    op.execute(f"UPDATE attempts SET host = {host}")  # noqa: S608
    op.create_index(op.f("ix_jobs_state_device_turn_at_id_upper_bytes"), "jobs", QUEUE)


def downgrade() -> None:
    op.drop_index(op.f("ix_jobs_state_device_turn_at_id_upper_bytes"), table_name="jobs")
    for table, name in [
        ("attempts", "upper_bytes"),
        ("attempts", "host"),
        ("jobs", "upper_bytes"),
        ("jobs", "turn_at"),
    ]:
        op.drop_column(table, name)
    op.execute("ALTER TABLE jobs RENAME COLUMN device TO device_kind")
    op.create_index(op.f("ix_jobs_state_priority_created_at"), "jobs", ["state", "priority", "created_at"])


def _add(table: str, name: str, kind: sa.types.TypeEngine, default: str) -> None:
    """The default is for the rows that are there: SQLite cannot take it away again without copying the table."""
    op.add_column(table, sa.Column(name, kind, nullable=False, server_default=default))


def _set_turns(connection: sa.Connection) -> None:
    jobs = sa.Table("jobs", sa.MetaData(), autoload_with=connection)
    statement = sa.select(jobs.c.id, jobs.c.created_at, jobs.c.priority).where(jobs.c.priority != 0)
    turns = [
        {"of_job": job_id, "turn": _utc(created_at) - timedelta(seconds=priority * POINT_SECONDS)}
        for job_id, created_at, priority in connection.execute(statement)
    ]
    if turns:
        update = sa.update(jobs).where(jobs.c.id == sa.bindparam("of_job")).values(turn_at=sa.bindparam("turn"))
        connection.execute(update, turns)


def _utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
