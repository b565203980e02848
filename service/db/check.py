"""Whether a database is whole: its revision, its tables, its pages, what its rows refer to, what was added
up.
"""

from __future__ import annotations

from dataclasses import dataclass

from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, Table, exists, func, select, text

from chunkplan.service.db.base import Base
from chunkplan.service.db.migrate import current_revision, head_revision
from chunkplan.service.db.tables import JobDayRow, MetricRow

_MAX_NAMED = 10


@dataclass(frozen=True)
class Finding:
    """One check and what it found."""

    check: str
    problems: list[str]
    """Empty when all is well."""


def check(connection: Connection) -> list[Finding]:
    """Every check that can be made; changes nothing. The later ones need the tables of the newest
    revision.
    """
    revision = _revision(connection)
    findings = [Finding("revision", revision)]
    findings.append(
        Finding("integrity", _sqlite_pages(connection) if _is_sqlite(connection) else _postgres(connection))
    )
    if revision:
        return findings
    return [
        *findings,
        Finding("tables", _tables(connection)),
        Finding(
            "foreign keys", [line for table in Base.metadata.sorted_tables for line in _orphans(connection, table)]
        ),
        Finding("rollups", _rollups(connection)),
    ]


def _is_sqlite(connection: Connection) -> bool:
    return connection.dialect.name == "sqlite"


def _revision(connection: Connection) -> list[str]:
    found, newest = current_revision(connection), head_revision()
    if found == newest:
        return []
    return [f"at {found or 'none'}, the newest is {newest}: run `chunkplan db upgrade`"]


def _sqlite_pages(connection: Connection) -> list[str]:
    lines = [row[0] for row in connection.execute(text(f"PRAGMA integrity_check({_MAX_NAMED})"))]
    return [] if lines == ["ok"] else lines


def _postgres(connection: Connection) -> list[str]:
    """What Postgres itself knows of: indexes that are not valid, constraints that were not checked, broken
    pages.
    """
    queries = {
        "index {} is not valid": "SELECT relname FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid "
        "WHERE NOT (indisvalid AND indisready)",
        "constraint {} was never checked": "SELECT conname FROM pg_constraint WHERE NOT convalidated",
        "{} pages with a wrong checksum": "SELECT checksum_failures FROM pg_stat_database "
        "WHERE datname = current_database() AND checksum_failures > 0",
    }
    return [message.format(row[0]) for message, query in queries.items() for row in connection.execute(text(query))]


def _tables(connection: Connection) -> list[str]:
    context = MigrationContext.configure(connection, opts={"compare_type": True})
    return [
        f"differs from what the code expects: {difference}" for difference in compare_metadata(context, Base.metadata)
    ]


def _orphans(connection: Connection, table: Table) -> list[str]:
    """Rows that refer to what is not there. Databases prevent them, unless somebody has told them not to."""
    found = []
    for key in table.foreign_keys:
        parent = key.column.table.alias()
        missing = select(func.count()).where(
            key.parent.is_not(None), ~exists().where(parent.c[key.column.name] == key.parent)
        )
        if count := connection.scalar(missing):
            found.append(f"{count} rows of {table.name} refer to {key.column.table.name} that are not there")
    return found


def _rollups(connection: Connection) -> list[str]:
    stored = select(func.count()).where(MetricRow.kind == "train").scalar_subquery()
    added = select(func.coalesce(func.sum(JobDayRow.num_steps), 0)).scalar_subquery()
    (steps, sums) = connection.execute(select(stored, added)).one()  # one statement: both as of the same moment
    return [] if steps == int(sums) else [f"{steps} training steps are stored, {sums} were added up by day"]
