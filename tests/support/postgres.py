"""A temporary Postgres cluster, run as an unprivileged user because the server refuses to run as root."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

import psycopg

import chunkplan.service.db.tables  # noqa: F401 - fills the metadata
from chunkplan.service.db.base import Base
from tests.support.waiting import wait_for


def find_binaries() -> Path:
    """The folder with initdb and postgres.

    Raises:
        AssertionError: Postgres is not installed; these tests do not pass without it.
    """
    config = shutil.which("pg_config")
    candidates = [Path(found).parent for name in ("postgres", "initdb") if (found := shutil.which(name))]
    if config:
        answer = subprocess.run([config, "--bindir"], capture_output=True, text=True, check=True)
        candidates.append(Path(answer.stdout.strip()))
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in candidates:
        if (folder / "initdb").is_file() and (folder / "postgres").is_file():
            return folder
    raise AssertionError("no Postgres here: install it (Debian: postgresql), or set TEST_DATABASE_URL")


class PostgresCluster:
    """A cluster that lives as long as the context."""

    def __init__(self) -> None:
        self._binaries = find_binaries()
        self._user = _unprivileged_user()
        self._folder = Path(tempfile.mkdtemp(prefix="chunkplan-postgres-"))
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Of the maintenance database."""
        return f"postgresql+psycopg://tests@127.0.0.1:{self._port}/postgres"

    def __enter__(self) -> PostgresCluster:
        if self._user is not None:
            os.chown(self._folder, self._user.pw_uid, self._user.pw_gid)
        data = self._folder / "data"
        self._run(
            "initdb", "-D", str(data), "-U", "tests", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"
        )
        self.start()
        return self

    def start(self) -> None:
        """Starts the server, on the port that it always has."""
        options = ["listen_addresses=127.0.0.1", f"unix_socket_directories={self._folder}", "fsync=off"]
        options += ["full_page_writes=off", "max_connections=100", "shared_buffers=32MB"]
        arguments = [item for option in options for item in ("-c", option)]
        log = (self._folder / "log.txt").open("ab")
        command = [
            *self._prefix(),
            str(self._binaries / "postgres"),
            "-D",
            str(self._folder / "data"),
            "-p",
            str(self._port),
            *arguments,
        ]
        self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder)
        log.close()
        wait_for(self._answers, "the Postgres cluster to answer")

    def stop(self) -> None:
        """Ends the server at once, and every connection with it; what was committed is there when it comes
        back."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(timeout=30)
            self._process = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "log.txt").read_text()
        try:
            psycopg.connect(_plain(self.url), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _prefix(self) -> list[str]:
        if self._user is None:
            return []
        return ["setpriv", f"--reuid={self._user.pw_uid}", f"--regid={self._user.pw_gid}", "--clear-groups", "--"]

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._prefix(), str(self._binaries / program), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=self._folder)


def create_database(server_url: str) -> str:
    """A fresh database on the server; its URL."""
    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(_plain(server_url), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return server_url.rpartition("/")[0] + f"/{name}"


def drop_database(server_url: str, url: str) -> None:
    """Removes a database, whoever is still connected to it."""
    with psycopg.connect(_plain(server_url), autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{url.rpartition("/")[2]}" WITH (FORCE)')


def empty_database(url: str) -> None:
    """Deletes every row of our tables."""
    tables = ", ".join(Base.metadata.tables)
    with psycopg.connect(_plain(url), autocommit=True) as connection:
        connection.execute(f"TRUNCATE {tables} RESTART IDENTITY")


def _plain(url: str) -> str:
    return url.replace("postgresql+psycopg://", "postgresql://")


def _unprivileged_user() -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return pwd.getpwnam("postgres" if "postgres" in names else "nobody")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
