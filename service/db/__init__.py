"""The database: engine, units of work, tables, migrations. SQLite and Postgres, the same code."""

from service.db.database import Database
from service.db.migrate import current_revision, downgrade, head_revision, upgrade

__all__ = ["Database", "current_revision", "downgrade", "head_revision", "upgrade"]
