"""``chunkplan keys``: the service's API keys, in its database. A running service follows at once."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chunkplan.engine.errors import InputError
from chunkplan.service.cli.output import JsonOption, console, moment, print_json, print_table
from chunkplan.service.cli.server import DatabaseOption, DataDirOption, migrated_database

if TYPE_CHECKING:
    from chunkplan.service.db.tables import ApiKeyRow

app = typer.Typer(help="API keys of the service.", no_args_is_help=True)

_UNITS = {"h": "hours", "d": "days"}


@app.command()
def create(
    name: Annotated[str, typer.Option(help="What it is for.")],
    project: Annotated[str, typer.Option(help="Whose jobs, files, plans and profiles it sees.")] = "default",
    scope: Annotated[
        list[str] | None,
        typer.Option(help="read, submit or admin; may be repeated. By default submit, which includes read."),
    ] = None,
    expires: Annotated[str | None, typer.Option(help="30d, 12h or 2027-01-31; by default never.")] = None,
    database_url: DatabaseOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create a key and print it: it is not stored and cannot be shown again."""
    now = datetime.now(UTC)
    expires_at = None if expires is None else parse_expiry(expires, now)
    with migrated_database(database_url, data_dir) as database:
        from chunkplan.service.access.service import Access
        from chunkplan.service.kit.clock import SystemClock

        row, text = Access(database, SystemClock()).create(
            name=name, project=project, scopes=scope or ["submit"], expires_at=expires_at
        )
    if as_json:
        print_json({**_view(row), "key": text})
        return
    console().print(f"{row.id} for project {row.project} may {' and '.join(row.scopes)}. Keep this, it is shown once:")
    print(text)


@app.command("list")
def list_keys(
    project: Annotated[str | None, typer.Option(help="Only keys of this project.")] = None,
    database_url: DatabaseOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """List keys, newest first."""
    with migrated_database(database_url, data_dir) as database:
        from chunkplan.service.access.service import Access
        from chunkplan.service.kit.clock import SystemClock

        keys = [_view(row) for row in Access(database, SystemClock()).list(project)]
    if as_json:
        print_json(keys)
        return
    rows = [
        (
            key["id"],
            key["name"],
            key["project"],
            " ".join(key["scopes"]),
            key["state"],
            moment(key["created_at"]),
            moment(key["expires_at"]),
            moment(key["last_used_at"]),
        )
        for key in keys
    ]
    print_table("", ["id", "name", "project", "scopes", "state", "created", "expires", "last used"], rows)


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Its id: key_….")],
    database_url: DatabaseOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Revoke a key, from the next request on; safe to repeat."""
    with migrated_database(database_url, data_dir) as database:
        from chunkplan.service.access.service import Access
        from chunkplan.service.errors import NotFound
        from chunkplan.service.kit.clock import SystemClock

        try:
            row = Access(database, SystemClock()).revoke(key)
        except NotFound as error:
            raise InputError("key", error.detail) from error
    if as_json:
        print_json(_view(row))
    else:
        console().print(f"{row.id} is revoked")


def parse_expiry(given: str, now: datetime) -> datetime:
    """``30d`` and ``12h`` from now, or a date, whose day is the first on which the key is not valid any more
    (UTC).

    Raises:
        InputError: for ``expires``.
    """
    match = re.fullmatch(r"(\d{1,5})([hd])", given)
    if match:
        return now + timedelta(**{_UNITS[match[2]]: int(match[1])})
    try:
        return datetime.strptime(given, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError as error:
        raise InputError("expires", f"should be like 30d, 12h or 2027-01-31 (got {given!r})") from error


def _view(row: ApiKeyRow) -> dict[str, Any]:
    now = datetime.now(UTC)
    is_expired = row.expires_at is not None and row.expires_at <= now
    times = {name: getattr(row, name) for name in ("created_at", "expires_at", "last_used_at", "revoked_at")}
    return {
        "id": row.id,
        "name": row.name,
        "project": row.project,
        "scopes": row.scopes,
        "state": "revoked" if row.revoked_at else "expired" if is_expired else "valid",
        **{name: None if time is None else time.strftime("%Y-%m-%dT%H:%M:%SZ") for name, time in times.items()},
    }
