"""The database: engine, units of work, tables, migrations. SQLite and Postgres, the same code."""

from chunkplan.service.db.database import Database, take_in_turn
from chunkplan.service.db.migrate import current_revision, downgrade, head_revision, upgrade

__all__ = ["Database", "current_revision", "downgrade", "head_revision", "take_in_turn", "upgrade"]
