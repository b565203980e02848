"""Engines and units of work.

`read()` and `write()` are the only ways to a session. A write commits when its block ends and rolls back when
it raises; nothing else commits. On SQLite a writer takes the write lock at once (BEGIN IMMEDIATE), so that
two writers queue up at the start instead of failing in the middle; on Postgres rows are locked where it
matters, and who stops in the middle of a unit of work loses it: a server that hangs must not keep what it has
locked from the others. Statements' parameters never show up in errors: they may be secrets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.orm import Session, sessionmaker

from chunkplan.service.db.projects import PROJECT

DEFAULT_TIMEOUT_SECONDS = 15.0


def normalise_url(url: str) -> URL:
    """The URL with the driver that we ship: psycopg 3 for Postgres, the standard library's for SQLite."""
    parsed = make_url(url)
    if parsed.drivername in {"postgresql", "postgres"}:
        return parsed.set(drivername="postgresql+psycopg")
    return parsed


def create_database_engine(url: str, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> Engine:
    """An engine with our connection settings; creates the folder of an SQLite file.

    Args:
        url: of the database.
        timeout_seconds: how long a statement waits for a lock, a connection for the server, and Postgres for
            the next statement of a unit of work that has begun.
    """
    parsed = normalise_url(url)
    milliseconds = int(timeout_seconds * 1000)
    if parsed.get_backend_name() != "sqlite":
        options = f"-c timezone=utc -c lock_timeout={milliseconds}"
        options += f" -c idle_in_transaction_session_timeout={milliseconds}"
        arguments = {"options": options, "connect_timeout": max(2, int(timeout_seconds))}
        return create_engine(
            parsed, pool_pre_ping=True, pool_size=10, max_overflow=20, connect_args=arguments, hide_parameters=True
        )
    if parsed.database:
        Path(parsed.database).absolute().parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, pool_size=10, max_overflow=20, hide_parameters=True)
    event.listen(engine, "connect", partial(_configure_sqlite, milliseconds))
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(busy_timeout: int, connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN would come too late: we send it ourselves
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", f"busy_timeout={busy_timeout}", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    immediate = connection.get_execution_options().get("chunkplan_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


class Database:
    """One engine and its two kinds of units of work."""

    def __init__(self, url: str, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        self.engine = create_database_engine(url, timeout_seconds)
        self._readers = sessionmaker(self.engine, expire_on_commit=False)
        self._writers = sessionmaker(self.engine.execution_options(chunkplan_write=True), expire_on_commit=False)
        self._info: dict[Any, Any] = {}

    def of(self, project: str) -> Database:
        """Return the database as one project sees it: requests are answered from nothing else."""
        bound = copy(self)
        bound._info = {PROJECT: project}
        return bound

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading; nothing it changes is kept."""
        with self._readers(info=self._info) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session whose changes are committed together, or not at all."""
        with self._writers(info=self._info) as session, session.begin():
            yield session

    def refresh_statistics(self) -> None:
        """Tells SQLite how its rows are distributed, without which it walks through a project's rows to find
        ten ids.

        Looks at a thousand rows of an index. Postgres does it by itself.
        """
        if self.engine.dialect.name == "sqlite":
            with self.write() as session:
                session.execute(text("PRAGMA analysis_limit=1000"))
                session.execute(text("ANALYZE"))

    def dispose(self) -> None:
        """Closes every pooled connection."""
        self.engine.dispose()


def take_in_turn(session: Session, name: str) -> None:
    """Until the unit of work ends, no other one passes here under the same name: for what is counted and then
    added.

    SQLite has one writer at a time anyway.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": name})
