"""The monitoring in docker-compose.yml: what its files ask the service for is there."""

import json
import re
from pathlib import Path

import pytest
import yaml
from starlette.testclient import TestClient

from chunkplan.service.app import create_app

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/chunkplan.json").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
PROMETHEUS = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())
SOURCES = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/chunkplan.yml").read_text())["datasources"]
SERVICE = "http://chunkplan:8321"
TARGETS = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
QUERIES = {target["url"].removeprefix(SERVICE): target for target in TARGETS if "url" in target}


@pytest.fixture
def database_url(tmp_path, migrated_sqlite):
    """One engine is enough: nothing here is stored."""
    path = tmp_path / "chunkplan.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    return f"sqlite:///{path}"


def test_every_metric_of_the_dashboard_exists(client):
    client.get("/v1/jobs")
    exported = set(re.findall(r"^# TYPE (\S+)", client.get("/metrics").text, re.MULTILINE))
    expressions = " ".join(target["expr"] for target in TARGETS if "expr" in target)
    used = set(re.findall(r"chunkplan_\w+", expressions))
    assert len(used) >= 8
    for name in used:
        assert name in exported or re.sub(r"_(bucket|count|sum)$", "", name) in exported, name


@pytest.mark.parametrize("path", QUERIES)
def test_every_query_of_the_dashboard_is_answered_with_its_columns(client, path):
    response = client.get(path)
    assert response.status_code == 200, response.text
    target = QUERIES[path]
    assert response.json()[target["root_selector"]] == []
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    row = next(name for part, name in ROWS.items() if part in path)
    assert {column["selector"] for column in target["columns"]} <= set(schemas[row]["properties"])


ROWS = {"/accuracy": "AccuracyRow", "/usage": "UsageRow", "/summary": "JobView"}


def test_the_files_name_each_other_rightly():
    service = COMPOSE["services"]["chunkplan"]
    assert "8321" in service["ports"][0]
    assert all(port.startswith("127.0.0.1:") for part in COMPOSE["services"].values() for port in part.get("ports", []))
    (scrape,) = PROMETHEUS["scrape_configs"]
    assert [f"http://{target}" for target in scrape["static_configs"][0]["targets"]] == [SERVICE]
    assert json.loads(service["environment"]["CHUNKPLAN_ALLOWED_HOSTS"]) == ["chunkplan"]
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"] for source in SOURCES}
    secret = f"/run/secrets/{next(iter(COMPOSE['secrets']))}"
    assert scrape["authorization"]["credentials_file"] == secret
    assert any(secret in str(source.get("secureJsonData")) for source in SOURCES)
    for part in COMPOSE["services"].values():
        for volume in part.get("volumes", []):
            source = volume.partition(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / source).exists(), source


@pytest.fixture
def by_name(settings, planner_process, clock):
    """The service as the other containers reach it."""
    app = create_app(settings.model_copy(update={"allowed_hosts": ["chunkplan"]}), planner=planner_process, clock=clock)
    client = TestClient(app, SERVICE)
    yield client
    client.close()
    app.state.services.database.dispose()


def test_the_monitoring_needs_no_key_before_there_is_one_and_then_an_admins(by_name):
    nobody = {"Authorization": "Bearer "}
    assert {by_name.get(path, headers=nobody).status_code for path in ["/metrics", *QUERIES]} == {200}
    access = by_name.app.state.services.access
    _, key = access.create(name="monitoring", project="default", scopes=["admin"], expires_at=None)
    assert {by_name.get(path, headers=nobody).status_code for path in ["/metrics", *QUERIES]} == {401}
    monitoring = {"Authorization": f"Bearer {key}"}
    assert {by_name.get(path, headers=monitoring).status_code for path in ["/metrics", *QUERIES]} == {200}
