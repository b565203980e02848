"""Two servers that start at the same moment, on a database that has no tables yet."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from chunkplan.service.db import Database
from chunkplan.service.db.check import check
from tests.support.live import LiveServer


@pytest.mark.slow
def test_two_servers_start_at_once_on_an_empty_database(empty_database_url, tmp_path):
    environment = {"CHUNKPLAN_DATABASE_URL": empty_database_url, "CHUNKPLAN_DATA_DIR": str(tmp_path / "var")}
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    servers = [LiveServer(environment | {"CHUNKPLAN_LOG_FORMAT": "json"}, log) for log in logs]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(LiveServer.wait_until_ready, servers))
    for server in servers:
        server.close()
    levels = [json.loads(line)["level"] for log in logs for line in log.read_text().splitlines()]
    assert set(levels) == {"info"}
    database = Database(empty_database_url)
    with database.engine.connect() as connection:
        assert [finding for finding in check(connection) if finding.problems] == []
    database.dispose()
