"""Every error is a problem: RFC 9457, with a code, and with the field where there is one."""

import pytest


def check(response, status, code):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status
    assert problem["code"] == code
    assert set(problem) >= {"type", "title", "status", "detail", "instance", "code", "errors"}
    return problem


def test_an_unknown_address_is_404(client):
    problem = check(client.get("/v1/nothing"), 404, "not_found")
    assert problem["instance"] == "/v1/nothing"


def test_a_wrong_method_is_405_and_names_the_right_ones(client):
    response = client.put("/v1/jobs")
    check(response, 405, "method_not_allowed")
    assert "GET" in response.headers["allow"]


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"[" * 100_000, b'{"model": NaN}'])
def test_a_body_that_is_no_json_is_refused(client, content):
    response = client.post("/v1/plans", content=content, headers={"content-type": "application/json"})
    assert response.status_code in {400, 422}
    assert response.headers["content-type"] == "application/problem+json"


def test_a_body_that_is_too_long_is_413(client):
    body = {"model": "x" * (1 << 19)}
    problem = check(client.post("/v1/plans", json=body), 413, "content_too_large")
    assert "bytes" in problem["detail"]


def test_a_body_that_hides_its_length_is_413(client):
    def stream():
        for _ in range(64):
            yield b" " * 8192

    response = client.post("/v1/plans", content=stream(), headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"after": "job_missing"}, "after"),
        ({"after": "\x00"}, "after"),
        ({"state": "sleeping"}, "state"),
        ({"model": "a\x00b"}, "model"),
    ],
)
def test_bad_query_parameters_name_themselves(client, parameters, field):
    problem = check(client.get("/v1/jobs", params=parameters), 422, "invalid_input")
    assert [error["field"] for error in problem["errors"]] == [field]


def test_every_response_carries_a_request_id(client):
    assert client.get("/healthz").headers["x-request-id"]
    assert client.get("/healthz", headers={"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/healthz", headers={"X-Request-ID": "two words"}).headers["x-request-id"] != "two words"
