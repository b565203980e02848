"""Plans over HTTP: computed by the real planner, stored once, never changed."""

import pytest
from sqlalchemy import event
from starlette.testclient import TestClient

from chunkplan.service.app import create_app
from chunkplan.service.plans.answers import Answers, PlanAnswer
from tests.conftest import TINY_MODEL

REQUEST = {"model": TINY_MODEL, "gpu": "rtx-4090", "training": {"seq_len": 128, "schedule": {"num_chunks": 8}}}


def test_a_plan_is_201_when_new_and_200_when_known(client):
    first = client.post("/v1/plans", json=REQUEST)
    assert first.status_code == 201
    plan = first.json()
    assert plan["id"].startswith("plan_")
    assert first.headers["location"] == f"/v1/plans/{plan['id']}"
    assert plan["fits"]
    assert sum(plan["peak"]["breakdown"].values()) == plan["peak"]["allocated_bytes"]
    assert [chunk["index"] for chunk in plan["chunks"]] == list(range(8))
    again = client.post("/v1/plans", json=REQUEST | {"gpu_count": 1})
    assert again.status_code == 200
    assert again.json() == plan
    assert client.get(f"/v1/plans/{plan['id']}").json() == plan
    assert [row["id"] for row in client.get("/v1/plans").json()["data"]] == [plan["id"]]


def test_gemma_3s_published_config_is_planned(client):
    """With fewer layers: two lists of them, of which one has kinds, and its config does not say which is
    which."""
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 7,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 3,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }
    response = client.post("/v1/plans", json={"model": {"config": config}, "gpu": "h100-80gb"})
    assert response.status_code == 201, response.text
    assert response.json()["model"]["num_layers"] == 10
    assert response.json()["fits"]


def test_what_was_answered_is_answered_again_without_the_database(client, services, settings, planner_process, clock):
    """Hundreds of requests at once are answered one after another: each must be cheap."""
    first = client.post("/v1/plans", json=REQUEST)
    asked = []
    event.listen(services.database.engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    again = client.post("/v1/plans", json=REQUEST)
    assert [text for text in asked if "plan" in text] == []
    other = create_app(settings, planner=planner_process, clock=clock)
    elsewhere = TestClient(other, "http://localhost")  # has to look it up
    answers = [again, elsewhere.post("/v1/plans", json=REQUEST), elsewhere.post("/v1/plans", json=REQUEST)]
    other.state.services.database.dispose()
    for answer in answers:
        assert (answer.status_code, answer.content) == (200, first.content)
        assert answer.headers["content-type"] == first.headers["content-type"] == "application/json"
        assert answer.headers["etag"] == first.headers["etag"]


def test_answers_are_kept_by_project_and_not_for_ever():
    answers = Answers(max_bytes=1000)
    for number in range(4):
        answers.keep("ours", PlanAnswer(f"plan_{number}", bytes(300)))
        assert answers.find("ours", "plan_0"), "what is asked for stays"
    assert answers.find("ours", "plan_1") is None
    assert answers.find("ours", "plan_3") is not None
    assert answers.find("theirs", "plan_3") is None
    answers.keep("ours", PlanAnswer("plan_large", bytes(2000)))
    assert answers.find("ours", "plan_large") is None, "larger than everything that may be kept"


def test_a_plan_has_its_id_as_etag(client):
    plan_id = client.post("/v1/plans", json=REQUEST).json()["id"]
    first = client.get(f"/v1/plans/{plan_id}")
    assert first.headers["etag"] == f'"{plan_id}"'
    again = client.get(f"/v1/plans/{plan_id}", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304
    assert again.content == b""


def test_a_timeline_reaches_the_peak_of_its_plan(client):
    plan = client.post("/v1/plans", json=REQUEST).json()
    timeline = client.get(f"/v1/plans/{plan['id']}/timeline").json()
    assert timeline["plan_id"] == plan["id"]
    points = timeline["points"]
    assert max(point["allocated_bytes"] for point in points) == plan["peak"]["allocated_bytes"]
    assert {point["chunk_index"] for point in points} == set(range(8))
    assert [point["seconds"] for point in points] == sorted(point["seconds"] for point in points)


@pytest.mark.parametrize(
    ("form", "media_type", "suffix", "beginning"),
    [
        ("perfetto", "application/json", ".perfetto.json", b'{"traceEvents":['),
        ("memory_snapshot", "application/octet-stream", ".pickle", b"\x80\x04"),
        ("svg", "image/svg+xml", ".svg", b"<?xml"),
        ("png", "image/png", ".png", b"\x89PNG"),
    ],
)
def test_a_timeline_in_the_formats_of_other_tools(client, form, media_type, suffix, beginning):
    plan_id = client.post("/v1/plans", json=REQUEST).json()["id"]
    answer = client.get(f"/v1/plans/{plan_id}/timeline", params={"format": form})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == media_type
    assert f'filename="{plan_id}{suffix}"' in answer.headers["content-disposition"]
    assert answer.content.startswith(beginning)


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"format": "csv"}, "format"),
        ({"format": "memory_snapshot", "chunk": 8}, "chunk"),
        ({"format": "memory_snapshot", "chunk": -1}, "chunk"),
        ({"chunk": 0}, "chunk"),
        ({"format": "svg", "chunk": 0}, "chunk"),
    ],
)
def test_a_timeline_that_cannot_be_is_refused(client, parameters, field):
    plan_id = client.post("/v1/plans", json=REQUEST).json()["id"]
    answer = client.get(f"/v1/plans/{plan_id}/timeline", params=parameters)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == field


def test_comparing_gives_a_plan_for_every_device_and_method(client):
    body = {"model": TINY_MODEL, "gpus": ["rtx-4090", "rtx-3060-12gb"], "methods": ["chunkft", "full"]}
    body["training"] = {"seq_len": 128, "schedule": {"num_chunks": 8}}
    answer = client.post("/v1/plans/compare", json=body)
    assert answer.status_code == 200
    rows = answer.json()["data"]
    assert [(row["gpu"], row["method"]) for row in rows] == [
        ("rtx-4090", "chunkft"),
        ("rtx-4090", "full"),
        ("rtx-3060-12gb", "chunkft"),
        ("rtx-3060-12gb", "full"),
    ]
    assert rows[0]["allocated_bytes"] < rows[1]["allocated_bytes"]
    assert client.get(f"/v1/plans/{rows[3]['id']}").json()["request"]["training"]["schedule"]["num_chunks"] == 1


def test_a_comparison_names_what_is_refused_and_plans_the_rest(client):
    body = {"model": TINY_MODEL, "gpus": ["nosuch", "rtx-4090"], "methods": ["chunkft"]}
    body["training"] = {"seq_len": 128, "schedule": {"num_chunks": 8}}
    refused, planned = client.post("/v1/plans/compare", json=body).json()["data"]
    assert (refused["object"], refused["gpu"], refused["field"]) == ("refusal", "nosuch", "gpu")
    assert "no GPU named 'nosuch'" in refused["detail"]
    assert (planned["object"], planned["fits"]) == ("plan", True)
    body["gpus"] = ["nosuch"]
    answer = client.post("/v1/plans/compare", json=body)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "gpu")


def test_what_does_not_fit_is_still_a_plan_and_names_alternatives(client):
    plan = client.post("/v1/plans", json=REQUEST | {"memory_limit_bytes": 2**20}).json()
    assert not plan["fits"]
    assert plan["capacity_bytes"] == 2**20
    assert plan["alternatives"][0]["why"]


def test_plans_are_paged_newest_first(client, clock):
    ids = []
    for num_chunks in (1, 2, 3, 4, 5):
        clock.advance(seconds=1)
        body = REQUEST | {"training": {"seq_len": 128, "schedule": {"num_chunks": num_chunks}}}
        ids.append(client.post("/v1/plans", json=body).json()["id"])
    first = client.get("/v1/plans", params={"limit": 2}).json()
    assert [row["id"] for row in first["data"]] == ids[:2:-1]
    assert first["has_more"]
    second = client.get("/v1/plans", params={"limit": 3, "after": first["last_id"]}).json()
    assert [row["id"] for row in second["data"]] == ids[2::-1]
    assert not second["has_more"]
    assert client.get("/v1/plans", params={"model": "gpt2"}).json()["data"] == []


@pytest.mark.parametrize("path", ["/v1/plans/plan_missing", "/v1/plans/%00", "/v1/plans/plan_missing/timeline"])
def test_an_unknown_plan_is_404(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.json()["code"] == "not_found"


def test_a_local_config_can_be_planned_by_path(client, models_dir):
    body = REQUEST | {"model": {"path": str(models_dir / TINY_MODEL)}}
    plan = client.post("/v1/plans", json=body).json()
    assert plan["model"]["name"] == TINY_MODEL
    assert plan["model"]["num_layers"] == 4
