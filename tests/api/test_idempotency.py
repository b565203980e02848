"""Idempotency-Key: at most one job for one key, whatever happens in between."""

from concurrent.futures import ThreadPoolExecutor

from chunkplan.service.jobs.idempotency import Claim, IdempotencyKeys
from tests.support.requests import job_request

KEY = {"Idempotency-Key": "order-66"}


def jobs(client):
    return client.get("/v1/jobs").json()["data"]


def test_the_same_body_replays_the_first_answer(client, dataset):
    first = client.post("/v1/jobs", json=job_request(dataset), headers=KEY)
    again = client.post("/v1/jobs", json=job_request(dataset) | {"priority": 0}, headers=KEY)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert len(jobs(client)) == 1


def test_another_body_under_the_same_key_is_422(client, dataset):
    client.post("/v1/jobs", json=job_request(dataset), headers=KEY)
    other = client.post("/v1/jobs", json=job_request(dataset, max_steps=3), headers=KEY)
    assert other.status_code == 422
    assert other.json()["code"] == "idempotency_key_reused"
    assert len(jobs(client)) == 1


def test_a_refused_request_gives_its_key_back(client, dataset):
    assert client.post("/v1/jobs", json=job_request(dataset) | {"gpu": "rtx-0"}, headers=KEY).status_code == 422
    assert client.post("/v1/jobs", json=job_request(dataset), headers=KEY).status_code == 201


def test_a_request_in_flight_is_409_until_its_claim_runs_out(client, dataset, services, clock):
    keys = IdempotencyKeys(services.database, clock, claim_seconds=10)
    assert isinstance(keys.claim("default", KEY["Idempotency-Key"], "0" * 64), Claim)
    blocked = client.post("/v1/jobs", json=job_request(dataset), headers=KEY)
    assert blocked.status_code == 422  # another body
    clock.advance(seconds=11)
    assert client.post("/v1/jobs", json=job_request(dataset), headers=KEY).status_code == 201


def test_a_claim_does_not_outlive_a_clock_that_is_set_back(client, dataset, services, clock):
    keys = IdempotencyKeys(services.database, clock, claim_seconds=10)
    clock.jump(hours=5)
    keys.claim("default", "lost", "0" * 64)
    clock.jump(hours=-5)
    assert isinstance(keys.claim("default", "lost", "0" * 64), Claim)


def test_requests_at_the_same_time_make_one_job(client, dataset):
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: client.post("/v1/jobs", json=job_request(dataset), headers=KEY), range(4)))
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert {answer.json()["code"] for answer in answers if answer.status_code == 409} <= {"idempotency_in_flight"}
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 201}) == 1
    assert len(jobs(client)) == 1


def test_a_key_that_is_no_key_is_refused(client, dataset):
    response = client.post("/v1/jobs", json=job_request(dataset), headers={"Idempotency-Key": "k" * 256})
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == "Idempotency-Key"
