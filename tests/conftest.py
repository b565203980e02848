"""Fixtures for every test: databases (SQLite, a real Postgres), a tiny model with data, the application, a
live server.

Nothing here imports torch; the trainers and planners that tests start do so in processes of their own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from chunkplan.service.app import create_app
from chunkplan.service.db import upgrade
from chunkplan.service.operation.logs import configure_logging
from chunkplan.service.plans.planning_process import PlannerProcess
from chunkplan.service.services import Services
from chunkplan.service.settings import Settings
from tests.support.clock import FixedClock
from tests.support.live import LiveServer
from tests.support.model import write_chats, write_tiny_model
from tests.support.postgres import PostgresCluster, create_database, drop_database, empty_database

TINY_MODEL = "smollm2-135m-instruct"
"""Catalog id under which the tests' tiny model lies in the models folder."""


@pytest.fixture(scope="session", autouse=True)
def _logging() -> None:
    configure_logging("console")


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server's maintenance database: TEST_DATABASE_URL, or a temporary cluster."""
    given = os.environ.get("TEST_DATABASE_URL")
    if given:
        yield given
        return
    with PostgresCluster() as cluster:
        yield cluster.url


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy."""
    path = tmp_path_factory.mktemp("database") / "template.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def migrated_postgres(postgres_url: str) -> Iterator[str]:
    """URL of a migrated Postgres database; tests take turns and leave it empty."""
    url = create_database(postgres_url)
    upgrade(url)
    yield url
    drop_database(postgres_url, url)


@pytest.fixture(params=["sqlite", "postgres"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without tables, on each engine."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
        return
    server = request.getfixturevalue("postgres_url")
    url = create_database(server)
    yield url
    drop_database(server, url)


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A migrated database, on each engine."""
    if request.param == "sqlite":
        path = tmp_path / "chunkplan.db"
        shutil.copy(request.getfixturevalue("migrated_sqlite"), path)
        yield f"sqlite:///{path}"
        return
    url = request.getfixturevalue("migrated_postgres")
    yield url
    empty_database(url)


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with one tiny model under a catalog id."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / TINY_MODEL)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small JSONL file of chats."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    write_chats(path, num_rows=64)
    return path


@pytest.fixture(scope="session")
def trace_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where planners of this session keep their traces: not where the user's are."""
    folder = tmp_path_factory.mktemp("traces")
    previous = os.environ.get("CHUNKPLAN_CACHE_DIR")
    os.environ["CHUNKPLAN_CACHE_DIR"] = str(folder)
    yield folder
    if previous is None:
        del os.environ["CHUNKPLAN_CACHE_DIR"]
    else:
        os.environ["CHUNKPLAN_CACHE_DIR"] = previous


@pytest.fixture(scope="session")
def planner_process(trace_cache: Path) -> Iterator[PlannerProcess]:
    """The real planner, in a process that all tests share."""
    planner = PlannerProcess(timeout_seconds=120, queue_seconds=60)
    yield planner
    planner.close()


@pytest.fixture
def settings(database_url: str, tmp_path: Path, models_dir: Path, dataset: Path) -> Settings:
    """Settings of an application whose files are the test's own."""
    return Settings(
        data_dir=tmp_path / "var",
        database_url=database_url,
        models_dir=models_dir,
        model_roots=[tmp_path],
        dataset_roots=[tmp_path, dataset.parent],
        max_body_bytes=1 << 18,
        max_upload_bytes=1 << 20,
    )


@pytest.fixture
def clock() -> FixedClock:
    """A clock that stands still until it is moved."""
    return FixedClock()


@pytest.fixture
def client(settings: Settings, planner_process: PlannerProcess, clock: FixedClock) -> Iterator[TestClient]:
    """The application without its supervisor: what is submitted stays queued."""
    app = create_app(settings, planner=planner_process, clock=clock)
    client = TestClient(app, "http://localhost", raise_server_exceptions=False)
    yield client
    client.close()
    app.state.services.database.dispose()


@pytest.fixture
def services(client: TestClient) -> Services:
    """The parts of the client's application."""
    services = client.app.state.services
    assert isinstance(services, Services)
    return services


@pytest.fixture
def start_server(
    database_url: str, tmp_path: Path, models_dir: Path, dataset: Path, trace_cache: Path
) -> Iterator[Callable[..., LiveServer]]:
    """Starts real servers on one database and one data folder; ends them, and asserts that no trainer is
    left."""
    servers: list[LiveServer] = []

    def start(module: str = "chunkplan.service.serve", **settings: object) -> LiveServer:
        environment = {
            "CHUNKPLAN_DATABASE_URL": database_url,
            "CHUNKPLAN_DATA_DIR": str(tmp_path / "var"),
            "CHUNKPLAN_MODELS_DIR": str(models_dir),
            "CHUNKPLAN_DATASET_ROOTS": f'["{dataset.parent}"]',
            "CHUNKPLAN_CACHE_DIR": str(trace_cache),
            **{f"CHUNKPLAN_{name.upper()}": str(value) for name, value in settings.items()},
        }
        server = LiveServer(environment, tmp_path / "server.log", module=module)
        servers.append(server)
        server.wait_until_ready()
        return server

    yield start
    for server in servers:
        server.close()
