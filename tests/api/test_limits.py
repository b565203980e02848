"""How much is too much: requests, uploads, jobs, streams, plans, bodies; refused with a reason, nothing
stored."""

import json
from concurrent.futures import ThreadPoolExecutor

import anyio
import httpx
import pytest
from starlette.testclient import TestClient

from chunkplan.service.access.limits import Turns
from chunkplan.service.app import create_app
from chunkplan.service.errors import TooMany
from chunkplan.service.http.middleware import is_nested_deeper
from chunkplan.service.settings import Quota, Settings
from tests.conftest import TINY_MODEL
from tests.support.requests import job_request

CONTENT = b'{"text": "one"}\n'


@pytest.fixture
def limited(settings, planner_process, clock):
    """A client whose project ``alpha`` has a small quota, and headers for keys."""
    clients = []

    def start(**quota):
        changed = settings.model_copy(update={"project_quotas": {"alpha": Quota(**quota)}})
        app = create_app(changed, planner=planner_process, clock=clock)
        clients.append(TestClient(app, "http://localhost", raise_server_exceptions=False))

        def key(project="alpha"):
            access = app.state.services.access
            _, text = access.create(name="test", project=project, scopes=["submit"], expires_at=None)
            return {"Authorization": f"Bearer {text}"}

        return clients[-1], key

    yield start
    for client in clients:
        client.close()
        client.app.state.services.database.dispose()


def upload(client, headers, content=CONTENT):
    return client.post("/v1/files", files={"file": ("data.jsonl", content)}, headers=headers)


def test_a_key_that_asks_too_often_is_told_when_to_come_back(limited, clock):
    client, key = limited(requests_per_second=0.5, requests_burst=3)
    hasty, other = key(), key()
    assert [client.get("/v1/jobs", headers=hasty).status_code for _ in range(4)] == [200, 200, 200, 429]
    refused = client.get("/v1/jobs", headers=hasty)
    assert (refused.json()["code"], refused.headers["retry-after"]) == ("rate_limited", "2")
    assert refused.headers["content-type"] == "application/problem+json"
    assert client.get("/v1/jobs", headers=other).status_code == 200
    clock.advance(seconds=2)
    assert [client.get("/v1/jobs", headers=hasty).status_code for _ in range(2)] == [200, 429]
    clock.advance(hours=-1)  # a clock that is set back gives nothing and takes nothing
    assert client.get("/v1/jobs", headers=hasty).status_code == 429
    clock.advance(seconds=2)
    assert client.get("/v1/jobs", headers=hasty).status_code == 200


def test_guessing_keys_is_slowed_down_and_keeps_nobody_else_out(limited, clock):
    client, key = limited()
    headers = key()
    guesses = [client.get("/v1/jobs", headers={"Authorization": "Bearer guess"}).status_code for _ in range(101)]
    assert guesses == [401] * 100 + [429]
    assert client.get("/v1/jobs", headers=headers).status_code == 200
    clock.advance(seconds=1)
    assert client.get("/v1/jobs").status_code == 401


def test_a_project_has_so_many_unfinished_jobs(limited, dataset):
    client, key = limited(max_open_jobs=1)
    alpha, beta = key("alpha"), key("beta")
    first = client.post("/v1/jobs", json=job_request(dataset), headers=alpha).json()
    again = client.post("/v1/jobs", json=job_request(dataset), headers=alpha | {"Idempotency-Key": "second"})
    assert (again.status_code, again.json()["code"]) == (409, "quota_exceeded")
    assert client.post("/v1/jobs", json=job_request(dataset), headers=beta).status_code == 201
    assert len(client.get("/v1/jobs", headers=alpha).json()["data"]) == 1
    client.post(f"/v1/jobs/{first['id']}/cancel", headers=alpha)
    retried = client.post("/v1/jobs", json=job_request(dataset), headers=alpha | {"Idempotency-Key": "second"})
    assert retried.status_code == 201, "a refusal uses up no key"


def test_a_project_stores_so_much_however_fast_it_uploads(limited, settings):
    client, key = limited(max_stored_bytes=len(CONTENT) + 1)
    alpha, beta = key("alpha"), key("beta")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: upload(client, alpha), range(4)))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409]
    assert {answer.json().get("code") for answer in answers} == {None, "quota_exceeded"}
    assert len(list(settings.files_dir.iterdir())) == 1
    assert upload(client, beta).status_code == 201
    (file,) = client.get("/v1/files", headers=alpha).json()["data"]
    client.delete(f"/v1/files/{file['id']}", headers=alpha)
    assert upload(client, alpha).status_code == 201


def test_a_known_plan_waits_for_no_turn(limited):
    client, key = limited(max_plans_at_once=1, max_waiting_plans=0)
    services, headers = client.app.state.services, key()
    request = {"model": TINY_MODEL, "gpu": "rtx-4090", "training": {"seq_len": 128, "schedule": {"num_chunks": 8}}}
    assert client.post("/v1/plans", json=request, headers=headers).status_code == 201

    async def while_another_plans():
        async with services.plan_turns.turn("project alpha", at_once=1):
            transport = httpx.ASGITransport(client.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as caller:
                known = await caller.post("/v1/plans", json=request)
                new = await caller.post("/v1/plans", json=request | {"memory_limit_bytes": 2**30})
                return known.status_code, new.status_code

    assert anyio.run(while_another_plans) == (200, 429)


def test_turns_are_taken_one_after_the_other_and_given_back():
    turns, log = Turns("too_many_plans", "requests for plans"), []

    async def take(name, number):
        async with turns.turn(name, at_once=1, max_waiting=1, max_seconds=5):
            log.append(f"{number} begins")
            await anyio.lowlevel.checkpoint()
            log.append(f"{number} ends")

    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(take, "alpha", 1)
            group.start_soon(take, "alpha", 2)
            await anyio.lowlevel.checkpoint()
            with pytest.raises(TooMany, match="2 requests for plans at once"):
                await take("alpha", 3)
            await take("beta", 4)  # does not wait for alpha

    anyio.run(main)
    assert [entry for entry in log if entry[0] in "12"] == ["1 begins", "1 ends", "2 begins", "2 ends"]
    assert log.index("4 begins") < log.index("2 ends")

    async def wait_in_vain():
        async with turns.turn("alpha", at_once=1, max_waiting=1, max_seconds=1):
            with pytest.raises(TooMany, match="no turn within"):
                async with turns.turn("alpha", at_once=1, max_waiting=1, max_seconds=0.01):
                    raise AssertionError
        async with turns.turn("alpha", at_once=1):
            pass

    anyio.run(wait_in_vain)


BOMBS = {
    "arrays": b"[" * 100_000,
    "closed arrays": b"[" * 65 + b"]" * 65,
    "objects": b'{"model":' * 20_000 + b"1" + b"}" * 20_000,
    "in a config": json.dumps({"model": {"config": json.loads('{"a":' * 70 + "1" + "}" * 70)}}).encode(),
    "after strings": b'{"model": "]]]]]]\\"}}}}", "gpu": ' + b"[" * 70,
}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("route", ["/v1/plans", "/v1/jobs", "/v1/plans/compare"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_nested_bodies_are_refused_before_they_are_parsed(client, route, bomb):
    response = client.post(route, content=BOMBS[bomb], headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (400, "bad_request")
    assert "64 levels" in response.json()["detail"]
    assert client.get("/v1/plans").json()["data"] == client.get("/v1/jobs").json()["data"] == []


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        (b"1", 0),
        (b'"[[[["', 0),
        (b'"\\"[[["', 0),
        (b'["\\\\", [[]]]', 3),
        (b'{"a": {"b": [1, {"c": "}"}]}}', 4),
        (b"[]" * 100, 1),
        (b'[[["unterminated', 3),
    ],
)
def test_depth_is_that_of_the_json(text, depth):
    assert not is_nested_deeper(text, depth)
    assert depth == 0 or is_nested_deeper(text, depth - 1)


HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_every_response_tells_browsers_to_keep_away(client, services, monkeypatch):
    answers = {
        200: client.get("/v1/jobs"),
        403: client.get("/v1/jobs", headers={"Host": "evil.example"}),
        404: client.get("/nothing"),
        413: client.post("/v1/plans", content=b"x" * (1 << 19)),
        422: client.post("/v1/plans", json={}),
    }
    monkeypatch.setattr(type(services.database), "of", lambda *_: 1 / 0)
    answers[500] = client.get("/v1/jobs")
    assert answers[500].json()["code"] == "internal_error"
    for status, answer in answers.items():
        assert answer.status_code == status
        assert answer.headers.items() >= HEADERS.items(), status
        assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-request-id"]
        assert "server" not in answer.headers
    page = client.get("/docs")
    assert "script-src 'unsafe-inline' https://cdn.jsdelivr.net" in page.headers["content-security-policy"]


def test_a_database_that_is_away_is_503(planner_process, tmp_path):
    settings = Settings(data_dir=tmp_path, database_url="postgresql://nobody:secret@127.0.0.1:9/nothing")
    app = create_app(settings, planner=planner_process)
    answer = TestClient(app, "http://localhost").get("/v1/jobs")
    assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
    assert answer.headers["retry-after"]
    assert "secret" not in answer.text
