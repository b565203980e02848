"""A copy of a database that is in use, whole as of one moment."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

from sqlalchemy.engine import URL

from chunkplan.service.db.database import normalise_url


class BackupFailed(Exception):
    """There is no copy; says why, and what to do."""


def backup(url: str, target: Path) -> None:
    """Copies a database into a file: SQLite's own format, or a custom-format dump of Postgres for
    ``pg_restore``.

    The file appears whole or not at all; nobody who uses the database waits.

    Raises:
        BackupFailed: see there.
    """
    if target.exists():
        raise BackupFailed(f"{target} exists already: name another file")
    if not target.parent.is_dir():
        raise BackupFailed(f"there is no folder {target.parent}")
    parsed = normalise_url(url)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.touch(mode=0o600, exist_ok=False)  # it holds what the database holds
    try:
        if parsed.get_backend_name() == "sqlite":
            _copy_sqlite(parsed, partial)
        else:
            _dump_postgres(parsed, partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


def _copy_sqlite(url: URL, target: Path) -> None:
    source = Path(url.database or "")
    if not source.is_file():
        raise BackupFailed(f"there is no database {source}")
    try:
        with (
            closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=15)) as live,
            closing(sqlite3.connect(target)) as copy,
        ):
            live.backup(copy)  # in one go: one snapshot, and in WAL mode nobody waits for a reader
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, without companions
            (answer,) = copy.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.Error as error:
        raise BackupFailed(f"the database cannot be copied: {error}") from error
    if answer != "ok":
        raise BackupFailed(f"the database is damaged, and so is its copy: {answer}")


def _dump_postgres(url: URL, target: Path) -> None:
    program = shutil.which("pg_dump")
    shown = url.set(drivername="postgresql", password=None).render_as_string()
    if program is None:
        raise BackupFailed(f"pg_dump is not here; where it is, run: pg_dump --format=custom --file={target} {shown}")
    environment = dict(os.environ)
    if url.password is not None:
        environment["PGPASSWORD"] = str(url.password)  # not an argument: those are for every user to see
    command = [program, "--format=custom", "--no-password", f"--file={target}", f"--dbname={shown}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BackupFailed(f"pg_dump: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
