"""API keys: who needs one, what it opens, and when it stops to."""

import hashlib
from datetime import timedelta

import pytest
from sqlalchemy import select, update

from chunkplan.service.db.tables import ApiKeyRow


@pytest.fixture
def key(services):
    """Creates a key; returns its row and the header that uses it."""

    def create(*scopes, project="alpha", **given):
        arguments = {"name": "test", "expires_at": None} | given
        row, text = services.access.create(project=project, scopes=scopes or ["submit"], **arguments)
        return row, {"Authorization": f"Bearer {text}"}

    return create


def refused(response, status, code):
    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    assert response.headers["content-type"] == "application/problem+json"
    return response


def test_nobody_needs_a_key_before_there_is_one_and_everybody_from_then_on(client, key, services):
    assert client.get("/v1/jobs").status_code == 200
    assert client.get("/v1/jobs", headers={"Authorization": "Bearer anything"}).status_code == 200
    row, header = key()
    answer = refused(client.get("/v1/jobs"), 401, "unauthenticated")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/jobs", headers=header).status_code == 200
    services.access.revoke(row.id)
    refused(client.get("/v1/jobs", headers=header), 401, "unauthenticated")
    refused(client.get("/v1/jobs"), 401, "unauthenticated")  # the door does not open again


def test_a_key_is_stored_as_a_hash_and_shown_once(services, key):
    row, header = key()
    text = header["Authorization"].removeprefix("Bearer ")
    with services.database.read() as session:
        stored = session.execute(select(ApiKeyRow.__table__)).mappings().one()
    assert stored["key_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    secret = text.rpartition("_")[2]
    assert not any(secret in str(value) for value in stored.values())
    assert row.id.removeprefix("key_") in text


def test_what_is_almost_a_key_is_none(client, key):
    _, header = key()
    text = header["Authorization"].removeprefix("Bearer ")
    other = "A" if text[-1] != "A" else "B"
    wrong = [
        "",
        "Bearer",
        text,
        f"Basic {text}",
        f"Bearer {text[:-1]}{other}",
        f"Bearer {text}A",
        f"Bearer {text[:-1]}",
        f"Bearer {text.upper()}",
        f"Bearer cpk_{'0' * 26}_{'A' * 43}",
        "Bearer cpk_' OR 1=1 --_",
        "Bearer \x7f\xff",
    ]
    answers = [client.get("/v1/jobs", headers={"Authorization": value.encode("latin-1")}) for value in wrong]
    assert [answer.status_code for answer in answers] == [401] * len(wrong)
    assert len({answer.json()["detail"] for answer in answers if b"cpk" in answer.request.headers.raw[-1][1]}) <= 2
    assert client.get("/v1/jobs", headers={"Authorization": f"bearer  {text} "}).status_code == 200


def test_a_key_expires(client, key, clock):
    _, header = key(expires_at=clock.now() + timedelta(hours=1))
    assert client.get("/v1/jobs", headers=header).status_code == 200
    clock.advance(hours=1)
    refused(client.get("/v1/jobs", headers=header), 401, "unauthenticated")


def test_the_last_use_is_remembered_without_a_write_per_request(client, key, clock, services):
    def last_used_at():
        with services.database.read() as session:
            return session.scalar(select(ApiKeyRow.last_used_at))

    _, header = key()
    begin = clock.now()
    for _ in range(3):
        client.get("/v1/jobs", headers=header)
        clock.advance(minutes=4)
    assert last_used_at() == begin
    client.get("/v1/jobs", headers=header)
    assert last_used_at() == begin + timedelta(minutes=12)
    with services.database.write() as session:
        session.execute(update(ApiKeyRow).values(last_used_at=None))
    refused(client.get("/v1/jobs"), 401, "unauthenticated")
    assert last_used_at() is None


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "two\nlines"}, "name"),
        ({"project": "Alpha"}, "project"),
        ({"project": "../alpha"}, "project"),
        ({"project": ""}, "project"),
        ({"scopes": ["root"]}, "scope"),
        ({"scopes": []}, "scope"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused(services, given, field):
    arguments = {"name": "a", "project": "alpha", "scopes": ["read"], "expires_at": None} | given
    with pytest.raises(ValueError, match=f"^{field}: "):
        services.access.create(**arguments)
    assert services.access.list() == []


class TestWithoutKeys:
    """While nobody needs a key, a browser on this machine must not become everybody's way in."""

    @pytest.mark.parametrize("host", ["localhost", "localhost:8321", "127.0.0.1:1", "[::1]:8321", "LOCALHOST"])
    def test_this_machine_may(self, client, host):
        assert client.get("/v1/jobs", headers={"Host": host}).status_code == 200

    @pytest.mark.parametrize(
        "host", ["evil.example", "localhost.evil.example:8321", "[", "", "a@b", "127.0.0.1.nip.io"]
    )
    def test_a_name_that_was_rebound_to_this_machine_may_not(self, client, host):
        answer = refused(client.get("/v1/jobs", headers={"Host": host}), 403, "host_not_allowed")
        assert "ALLOWED_HOSTS" in answer.json()["detail"]

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "https://evil.example"},
            {"Origin": "http://localhost:3000"},
            {"Origin": "null"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ],
    )
    def test_a_page_of_another_site_may_not(self, client, headers):
        files = {"file": ("data.jsonl", b'{"text": "one"}\n')}
        refused(client.post("/v1/files", files=files, headers=headers), 403, "cross_origin")
        assert client.get("/v1/files").json()["data"] == []

    def test_our_own_documentation_may(self, client):
        headers = {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}
        assert client.get("/v1/jobs", headers=headers).status_code == 200

    @pytest.mark.parametrize("name", ["Forwarded", "X-Forwarded-For"])
    def test_a_proxy_may_not(self, client, name):
        refused(client.get("/v1/jobs", headers={name: "for=192.0.2.1"}), 403, "proxy_without_keys")

    def test_no_other_origin_is_told_that_it_may_read(self, client):
        headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
        answers = [client.options("/v1/jobs", headers=headers), client.get("/healthz", headers=headers)]
        assert not any(name.startswith("access-control-") for answer in answers for name in answer.headers)


def test_with_a_key_host_and_origin_do_not_matter(client, key):
    _, header = key()
    headers = {"Host": "gpus.example", "Origin": "https://app.example", "X-Forwarded-For": "192.0.2.1"}
    assert client.get("/v1/jobs", headers=header | headers).status_code == 200
