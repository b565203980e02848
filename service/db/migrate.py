"""The Alembic chain in ``migrations/``, run from code."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from chunkplan.service.db.database import create_database_engine

_MIGRATION_LOCK = 0x63_68_75_6E_6B
"""Key of the Postgres advisory lock that lets one server migrate at a time."""


def alembic_config(connection: Connection | None = None) -> Config:
    """Alembic's configuration for the packaged chain."""
    config = Config()
    config.set_main_option("script_location", str(files("chunkplan.migrations")))
    config.attributes["connection"] = connection
    return config


def upgrade(url: str, revision: str = "head") -> None:
    """Brings the database at ``url`` to ``revision``."""
    _run(url, lambda config: command.upgrade(config, revision))


def downgrade(url: str, revision: str = "base") -> None:
    """Takes the database at ``url`` back to ``revision``."""
    _run(url, lambda config: command.downgrade(config, revision))


@cache
def head_revision() -> str | None:
    """The newest revision of the chain, as this process was started with it."""
    return ScriptDirectory.from_config(alembic_config()).get_current_head()


def current_revision(connection: Connection) -> str | None:
    """The revision that a database is at."""
    return MigrationContext.configure(connection).get_current_revision()


def _run(url: str, step: Callable[[Config], None]) -> None:
    engine = create_database_engine(url).execution_options(chunkplan_write=True)
    try:
        with engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SET LOCAL lock_timeout = 0"))
                connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            step(alembic_config(connection))
    finally:
        engine.dispose()
