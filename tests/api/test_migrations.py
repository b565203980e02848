"""One Alembic chain for both databases."""

from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, inspect

import service.db.tables  # noqa: F401
from service.db import current_revision, downgrade, head_revision, upgrade
from service.db.base import Base


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
