"""Alembic's entry point: a given connection (from `chunkplan.service.db.upgrade`), or the configured
database.
"""

from alembic import context
from sqlalchemy import Connection

import chunkplan.service.db.tables  # noqa: F401 - fills the metadata
from chunkplan.service.db.base import Base, UtcDateTime
from chunkplan.service.db.database import create_database_engine
from chunkplan.service.settings import Settings


def render_item(kind: str, item: object, _context: object) -> str | bool:
    """Migrations are history: they name SQLAlchemy's types, not ours."""
    return "sa.DateTime(timezone=True)" if kind == "type" and isinstance(item, UtcDateTime) else False


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        render_item=render_item,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with create_database_engine(Settings().database_url).begin() as connection:
        run(connection)
