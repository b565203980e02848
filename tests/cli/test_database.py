"""``chunkplan db``: while somebody writes, on both databases."""

import json
import sqlite3
import subprocess
import threading

import pytest
from sqlalchemy import func, select, text

from chunkplan.service.db import Database, upgrade
from chunkplan.service.db.backup import BackupFailed, backup
from chunkplan.service.db.check import check
from chunkplan.service.db.tables import GpuRow
from tests.support.clock import FixedClock
from tests.support.postgres import create_database, drop_database


@pytest.fixture
def database(empty_database_url):
    upgrade(empty_database_url)
    database = Database(empty_database_url)
    yield database
    database.dispose()


def problems(database):
    with database.engine.connect() as connection:
        return {finding.check: finding.problems for finding in check(connection)}


def add_gpus(database, numbers):
    for number in numbers:
        with database.write() as session:
            session.add(GpuRow(id=f"gpu-{number:05d}", entry={"memory_bytes": number}, created_at=FixedClock().now()))


def test_a_whole_database_passes_every_check(database):
    assert problems(database) == {name: [] for name in ("revision", "integrity", "tables", "foreign keys", "rollups")}


def test_what_is_wrong_is_named(database):
    with database.engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            connection.execute(text("COMMIT"))
            connection.execute(text("PRAGMA foreign_keys=OFF"))
            connection.execute(text("BEGIN"))
        else:
            connection.execute(text("SET session_replication_role = replica"))
        connection.execute(
            text("INSERT INTO job_days VALUES ('job_gone', '2026-01-01', 3, 1, 1.0, 1.0, 1.0, 1.0, 1.0, 1, 'default')")
        )
        connection.execute(text("DROP INDEX ix_profile_phases_groups"))
    found = problems(database)
    assert found["foreign keys"] == ["1 rows of job_days refer to jobs that are not there"]
    assert found["rollups"] == ["0 training steps are stored, 3 were added up by day"]
    assert "ix_profile_phases_groups" in found["tables"][0]
    assert found["integrity"] == found["revision"] == []


def test_an_older_database_is_said_to_be_older(empty_database_url):
    upgrade(empty_database_url, "0001")
    database = Database(empty_database_url)
    found = problems(database)
    database.dispose()
    assert "0001" in found["revision"][0]
    assert "db upgrade" in found["revision"][0]


def test_damaged_pages_are_found(chunkplan, tmp_path, in_process):
    path = tmp_path / "var" / "chunkplan.db"
    assert in_process("db", "upgrade").returncode == 0
    database = Database(f"sqlite:///{path}")
    add_gpus(database, range(200))
    database.dispose()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_gpus_1'").fetchone()
    connection.close()
    with path.open("rb+") as file:
        file.seek((page - 1) * page_size + 8)
        file.write(b"\xff" * 64)
    result = in_process("db", "check", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["ok"] is False


def test_a_backup_is_whole_while_others_write(database, empty_database_url, tmp_path, request):
    add_gpus(database, range(50))
    target = tmp_path / "copy"
    stop = threading.Event()

    def write():
        number = 50
        while not stop.is_set():
            add_gpus(database, [number])
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        backup(empty_database_url, target)
    finally:
        stop.set()
        writer.join()
    assert target.stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.glob(".*")] == []
    with database.read() as session:
        written = session.scalar(select(func.count()).select_from(GpuRow))
    with Restored(empty_database_url, target, request) as copy, copy.read() as session:
        ids = session.scalars(select(GpuRow.id).order_by(GpuRow.id)).all()
    assert 50 <= len(ids) <= written
    assert ids == [f"gpu-{number:05d}" for number in range(len(ids))], "everything up to one moment, nothing after it"
    with pytest.raises(BackupFailed, match="exists already"):
        backup(empty_database_url, target)


class Restored:
    def __init__(self, url, file, request):
        self.server = None
        if url.startswith("sqlite"):
            self.url = f"sqlite:///{file}"
            return
        self.server = request.getfixturevalue("postgres_url")
        self.url = create_database(self.server)
        plain = self.url.replace("+psycopg", "")
        subprocess.run(["pg_restore", "--exit-on-error", f"--dbname={plain}", file], check=True)

    def __enter__(self):
        self.database = Database(self.url)
        assert problems(self.database)["tables"] == []
        return self.database

    def __exit__(self, *_error):
        self.database.dispose()
        if self.server:
            drop_database(self.server, self.url)


def test_without_pg_dump_the_command_is_named_and_the_password_is_not(tmp_path, in_process, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    url = "postgresql://somebody:hunter2@database.example/plans"
    result = in_process("db", "backup", tmp_path / "dump", "--database-url", url)
    assert result.returncode == 1
    assert "pg_dump --format=custom" in result.stderr
    assert "hunter2" not in result.stderr
    assert not (tmp_path / "dump").exists()


def test_the_verbs(in_process, tmp_path):
    assert "there is no database" in in_process("db", "check").stderr
    assert in_process("db", "upgrade").returncode == 0
    result = in_process("db", "check")
    assert (result.returncode, result.stdout.count(": ok")) == (0, 5), result.stdout
    copied = json.loads(in_process("db", "backup", tmp_path / "copy.db", "--json").stdout)
    assert copied["size_bytes"] == (tmp_path / "copy.db").stat().st_size
    assert in_process("db", "check", "--database-url", f"sqlite:///{tmp_path / 'copy.db'}").returncode == 0
    again = in_process("db", "backup", tmp_path / "copy.db")
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    assert in_process("db", "backup", tmp_path / "no" / "copy.db").returncode == 1
    pruned = json.loads(in_process("db", "prune", "--json").stdout)
    assert pruned == {"samples": 0, "step_events": 0, "idempotency_keys": 0}
