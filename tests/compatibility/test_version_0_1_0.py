"""What the version before the rooms has left behind: its database opens, its stopped run goes on."""

import json
import zipfile
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from chunkplan.service.app import create_app
from chunkplan.service.db import upgrade
from chunkplan.service.settings import Settings
from tests.support.runs import events_of, exit_code, start_worker

DATA = Path(__file__).with_name("version_0_1_0.zip")


@pytest.fixture
def left(tmp_path):
    """Everything that was left, unpacked."""
    with zipfile.ZipFile(DATA) as archive:
        archive.extractall(tmp_path)
    return tmp_path


@pytest.fixture
def old_client(left, planner_process, clock):
    """Today's service over the old database."""
    url = f"sqlite:///{left / 'server.db'}"
    upgrade(url)
    app = create_app(Settings(data_dir=left / "var", database_url=url), planner=planner_process, clock=clock)
    yield TestClient(app, "http://localhost")
    app.state.services.database.dispose()


def test_its_database_opens_and_says_the_same(old_client, left):
    seen = json.loads((left / "seen.json").read_text())
    plan = old_client.get(f"/v1/plans/{seen['plan']['id']}").json()
    assert plan["peak"] == seen["plan"]["peak"]
    assert plan["schedule"] == seen["plan"]["schedule"]
    job = old_client.get(f"/v1/jobs/{seen['done']['id']}").json()
    assert job == seen["done"]
    assert job["state"] == "succeeded"
    profile = old_client.get(f"/v1/profiles/{seen['profile']['id']}").json()
    assert {name: profile[name] for name in seen["profile"]} == seen["profile"]
    assert old_client.get(f"/v1/jobs/{job['id']}/metrics").json()["data"] == seen["metrics"]
    assert [row["id"] for row in old_client.get("/v1/jobs").json()["data"]] == seen["jobs"]


def test_a_plan_of_its_request_is_a_new_one_with_the_same_figures(old_client, left):
    old = json.loads((left / "seen.json").read_text())["plan"]
    response = old_client.post("/v1/plans", json=old["request"])
    assert response.status_code == 201
    new = response.json()
    assert new["id"] != old["id"], "another planner's plan is another plan"
    assert (new["peak"], new["step_seconds"]) == (old["peak"], old["step_seconds"])


def test_its_stopped_run_goes_on_as_it_would_have(left):
    run = left / "run" / "run"
    job = json.loads((run / "job.json").read_text())
    moved = {"model_path": str(left / "run" / "base"), "dataset_path": str(left / "run" / "rows.jsonl")}
    (run / "job.json").write_text(json.dumps(job | moved))
    assert exit_code(start_worker(run, 2)) == 0, (run / "attempts" / "2" / "log.txt").read_text()
    losses = {str(event["step"]): event["loss"] for event in events_of(run, 2, "step")}
    expected = json.loads((left / "losses.json").read_text())
    assert events_of(run, 2, "started")[0]["resumed_step"] == int(min(expected, key=int)) - 1 > 0
    assert losses == pytest.approx(expected, rel=1e-4)
