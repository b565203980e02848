"""``chunkplan serve``: the service itself, and what its verbs need of its settings and its database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chunkplan.service.cli.exits import USAGE, CommandError
from chunkplan.service.cli.output import JsonOption, print_json

if TYPE_CHECKING:
    from chunkplan.service.db import Database
    from chunkplan.service.settings import Settings

DatabaseOption = Annotated[
    str | None, typer.Option(help="sqlite:///PATH or postgresql://…; by default in the data dir.")
]
DataDirOption = Annotated[Path | None, typer.Option(help="Database, uploads, runs and locks; by default ./var.")]


def settings_with(**given: Any) -> Settings:
    """The service's settings; what was typed wins over the environment.

    Raises:
        CommandError: a setting cannot be used; names it.
    """
    from pydantic import ValidationError

    from chunkplan.service.settings import Settings

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        raise CommandError(f"{name}: {first['msg'].removeprefix('Value error, ')}", USAGE) from error


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; by default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; by default 8321.")] = None,
    database_url: DatabaseOption = None,
    data_dir: DataDirOption = None,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print every setting that is in force, as a settings file; do no more."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run the service until Ctrl-C. Settings come from options, CHUNKPLAN_* variables and
    CHUNKPLAN_SETTINGS_FILE.
    """
    settings = settings_with(host=host, port=port, database_url=database_url, data_dir=data_dir)
    if print_config:
        from chunkplan.service.cli.settings_file import as_toml, shown

        if as_json:
            print_json(shown(settings))
        else:
            print(as_toml(settings), end="")
        return
    from chunkplan.service.serve import OpenDoor
    from chunkplan.service.serve import serve as run

    with database_errors():
        try:
            run(settings)
        except OpenDoor as error:
            raise CommandError(f"host: {error}", USAGE) from error


@contextmanager
def migrated_database(database_url: str | None, data_dir: Path | None) -> Iterator[Database]:
    """The service's database at its newest revision.

    Raises:
        CommandError: a setting cannot be used, or the database cannot be reached.
    """
    settings = settings_with(database_url=database_url, data_dir=data_dir)
    from chunkplan.service.db import Database, upgrade

    with database_errors():
        upgrade(settings.database_url)
        database = Database(settings.database_url, settings.database_timeout_seconds)
        try:
            yield database
        finally:
            database.dispose()


@contextmanager
def database_errors() -> Iterator[None]:
    """Turns what the database raises into one line."""
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        yield
    except ArgumentError as error:
        raise CommandError(f"database_url: {error}", USAGE) from error
    except SQLAlchemyError as error:
        raise CommandError(f"cannot use the database: {str(error).splitlines()[0]}") from error
