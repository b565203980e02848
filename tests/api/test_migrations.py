"""One Alembic chain for both databases."""

from datetime import UTC, datetime

from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, inspect, select, text

from service.db import Database, current_revision, downgrade, head_revision, upgrade
from service.db.base import Base
from service.db.tables import EventRow, FileRow, JobRow, PlanRow, PlanUseRow


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
