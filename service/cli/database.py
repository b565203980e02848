"""``chunkplan db``: the service's database. All of it may be done while the service runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chunkplan.service.cli.exits import FAILED, USAGE, CommandError
from chunkplan.service.cli.output import JsonOption, console, gibibytes, print_json
from chunkplan.service.cli.server import (
    DatabaseOption,
    DataDirOption,
    database_errors,
    migrated_database,
    settings_with,
)

app = typer.Typer(help="The service's database.", no_args_is_help=True)


@app.command()
def upgrade(database_url: DatabaseOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Bring the database to the newest revision; the service does this at its start, too."""
    with migrated_database(database_url, data_dir):
        from chunkplan.service.db import head_revision
    if as_json:
        print_json({"revision": head_revision()})
    else:
        console().print(f"the database is at revision {head_revision()}")


@app.command()
def check(database_url: DatabaseOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> int:
    """Check that the database is whole; changes nothing. Exit code 1 when it is not."""
    settings = settings_with(database_url=database_url, data_dir=data_dir)
    from sqlalchemy.engine import make_url

    from chunkplan.service.db import Database
    from chunkplan.service.db.check import check as run

    path = make_url(settings.database_url)
    if path.get_backend_name() == "sqlite" and not Path(path.database or "").is_file():
        raise CommandError(f"there is no database {path.database}")
    with database_errors():
        database = Database(settings.database_url, settings.database_timeout_seconds)
        try:
            with database.engine.connect() as connection:
                findings = run(connection)
        finally:
            database.dispose()
    if as_json:
        print_json({"ok": not any(finding.problems for finding in findings), "checks": [vars(f) for f in findings]})
    else:
        for finding in findings:
            console().print(f"{finding.check}: {'; '.join(finding.problems) or 'ok'}", markup=False)
    return FAILED if any(finding.problems for finding in findings) else 0


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Must not exist.")],
    database_url: DatabaseOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy the database into FILE (SQLite), or dump it there (Postgres: pg_dump); not the data folder's other
    files.
    """
    settings = settings_with(database_url=database_url, data_dir=data_dir)
    from chunkplan.service.db.backup import BackupFailed
    from chunkplan.service.db.backup import backup as run

    with database_errors():
        try:
            run(settings.database_url, file.absolute())
        except BackupFailed as error:
            raise CommandError(f"file: {error}", USAGE if file.exists() else FAILED) from error
        except OSError as error:
            raise CommandError(f"file: {error}") from error
    size_bytes = file.stat().st_size
    if as_json:
        print_json({"file": str(file), "size_bytes": size_bytes})
    else:
        console().print(f"{file}: {gibibytes(size_bytes)}", markup=False)


@app.command()
def prune(database_url: DatabaseOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Delete what is past its retention; the service does this every hour, too."""
    settings = settings_with(database_url=database_url, data_dir=data_dir)
    from chunkplan.service.kit.clock import SystemClock
    from chunkplan.service.operation.retention import Retention

    with migrated_database(database_url, data_dir) as database:
        deleted = Retention(database, settings, SystemClock()).prune()
    if as_json:
        print_json(deleted)
    else:
        for name, count in deleted.items():
            console().print(f"{name.replace('_', ' ')}: {count} deleted")
