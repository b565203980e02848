"""What an attacker sends: refused, logged without secrets, nothing stored."""

import io
import json
import logging
import re
import socket

import psutil
import pytest
import structlog
from sqlalchemy import func, select

from chunkplan.service.access.service import Access
from chunkplan.service.db import Database
from chunkplan.service.db.base import Base
from chunkplan.service.kit.clock import SystemClock
from chunkplan.service.operation.logs import configure_logging
from tests.support.requests import job_request

GIGABYTES_10 = 10 * 10**9
MARK = "sk-should-not-be-anywhere"


@pytest.fixture
def log():
    """What the service logs during the test, as lines."""
    stream = io.StringIO()
    configure_logging("console")
    (handler,) = logging.getLogger().handlers
    handler.setStream(stream)
    yield lambda: stream.getvalue().splitlines()
    configure_logging("console")


@pytest.fixture
def json_log(log):
    configure_logging("json")
    (handler,) = logging.getLogger().handlers
    handler.setStream(stream := io.StringIO())
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def stored(services):
    """How many rows there are, of anything but keys and plans."""
    with services.database.read() as session:
        tables = [
            table for name, table in Base.metadata.tables.items() if name not in {"api_keys", "plans", "plan_uses"}
        ]
        return sum(session.scalar(select(func.count()).select_from(table)) for table in tables)


@pytest.fixture
def paths(tmp_path, settings, dataset):
    """Names of a file outside every root, and of things that are no files."""
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "secret.jsonl").write_bytes(dataset.read_bytes())
    (outside / "config.json").write_text("{}")
    (tmp_path / "link.jsonl").symlink_to(outside / "secret.jsonl")
    (tmp_path / "folder").symlink_to(outside)
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    name = outside.name
    return {
        "..": f"{tmp_path}/../{name}/secret.jsonl",
        ". and ..": f"{tmp_path}/./x/../../{name}/secret.jsonl",
        "link to a file": f"{tmp_path}/link.jsonl",
        "link to a folder": f"{tmp_path}/folder/secret.jsonl",
        "link to itself": f"{tmp_path}/loop.jsonl",
        "absolute": "/etc/passwd",
        "home": "~root/.bashrc",
        "process": "/proc/self/environ",
        "NUL": f"{tmp_path}/rows.jsonl\x00.txt",
        "encoded": f"{tmp_path}/%2e%2e/{name}/secret.jsonl",
        "twice encoded": f"{tmp_path}/%252e%252e/{name}/secret.jsonl",
        "overlong": f"{tmp_path}/\u2025/{name}/secret.jsonl",
        "backslashes": f"{tmp_path}\\..\\{name}\\secret.jsonl",
        "file URL": f"file://{outside}/secret.jsonl",
        "endless": "a/" * 3000,
        "long name": "a" * 300,
    }


def test_no_path_leads_out_of_the_roots(client, services, dataset, paths):
    for kind, path in paths.items():
        for field, body in (
            ("dataset.path", job_request(dataset) | {"dataset": {"path": path}}),
            ("model.path", job_request(dataset) | {"model": {"path": path}}),
        ):
            response = client.post("/v1/jobs", json=body)
            assert response.status_code == 422, (kind, response.text)
            assert response.json()["errors"][0]["field"] == field, kind
            assert "root:" not in response.text
            assert "metal" not in response.text
        plan = {"model": {"path": path}, "gpu": "cpu"}
        assert client.post("/v1/plans", json=plan).status_code == 422, kind
    assert stored(services) == 0


@pytest.mark.parametrize(
    "name",
    [
        "../../chunkplan.db",
        "..%2f..%2fchunkplan.db",
        "%2e%2e/%2e%2e/chunkplan.db",
        "..%5c..%5cchunkplan.db",
        "%2fetc%2fpasswd",
        "/etc/passwd",
        "a%00b",
        "%0d%0aSet-Cookie:%20a=b",
        "%252e%252e%252fchunkplan.db",
    ],
)
def test_no_url_leads_to_a_file(client, dataset, name):
    job_id = client.post("/v1/jobs", json=job_request(dataset)).json()["id"]
    for path in (f"/v1/jobs/{job_id}/artifacts/{name}", f"/v1/files/{name}/content", f"/v1/files/{name}"):
        response = client.get(path)
        assert response.status_code == 404, path
        assert response.headers["content-type"] == "application/problem+json"
        assert "set-cookie" not in response.headers


@pytest.mark.parametrize("name", ["a\r\nX-Evil: 1.jsonl", "a\x00b.jsonl", "a\x1b[2Jb.jsonl", "\u202egpj.jsonl"])
def test_an_upload_cannot_bring_its_own_headers(client, services, name):
    body = (
        f'--b\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n{{"text": "one"}}\n\r\n--b--\r\n'
    )
    headers = {"content-type": "multipart/form-data; boundary=b"}
    response = client.post("/v1/files", content=body.encode(), headers=headers)
    if response.status_code == 201:  # the name ends where the line does
        assert response.json()["filename"] == '"a'
        download = client.get(f"/v1/files/{response.json()['id']}/content")
        assert "x-evil" not in download.headers
        assert download.headers["content-disposition"] == "attachment; filename*=utf-8''%22a"
    else:
        assert response.status_code in {400, 422}, response.text
        assert stored(services) == 0


def test_a_log_line_cannot_be_forged(client, log):
    forged = "2026-11-23T05:00:00Z [info] attempt ended"
    for path in (f"/v1/jobs/%0a{forged}", "/v1/jobs/%1b%5b2J%1b%5b1;1H", "/v1/%e2%80%a8x", "/v1/jobs/a%0d%0ab"):
        client.delete(path)
    client.get("/v1/nothing", headers={"X-Request-ID": "two words", "User-Agent": forged})
    lines = log()
    assert len(lines) == 5
    assert not any(line.startswith(forged[:20]) for line in lines)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u2028]", "".join(lines))
    assert "\\n2026-11-23T05:00:00Z" in lines[0]


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_no_secret_reaches_the_log(client, services, log, request, log_format, monkeypatch):
    read = log if log_format == "console" else request.getfixturevalue("json_log")
    row, text = services.access.create(name="test", project="alpha", scopes=["submit"], expires_at=None)
    secret = text.rpartition("_")[2]
    header = {"Authorization": f"Bearer {text}"}
    client.post("/v1/files", files={"file": ("data.jsonl", MARK.encode())}, headers=header)
    client.post("/v1/plans", json={"model": MARK, "gpu": MARK}, headers=header | {"Cookie": MARK})
    client.delete(f"/v1/files/{text}", headers=header)  # pasted where it does not belong
    client.delete(f"/v1/files?api_key={text}&other={MARK}", headers=header)
    client.post("/v1/jobs", json={}, headers={"Authorization": f"Basic {MARK}"})
    structlog.get_logger("test").info("a value", value=text)
    logging.getLogger("somebody.else").warning("said %s", text)
    monkeypatch.setattr(type(services.database), "of", lambda *_: {}[text])
    assert client.get("/v1/jobs", headers=header).status_code == 500
    said = str(read())
    assert "KeyError" in said
    assert row.id in said
    assert secret not in said
    assert MARK not in said


def raw(server, request, body=b""):
    """What the server answers to bytes that no client library would send."""
    with socket.create_connection((server.http.base_url.host, server.http.base_url.port), timeout=20) as connection:
        connection.sendall(request.replace("\n", "\r\n").encode("latin-1") + body)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer.decode("latin-1")


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_live_server_is_small_and_refuses_what_is_large_or_malformed(start_server, database_url, tmp_path):
    server = start_server(max_upload_bytes=1 << 20, quota__max_streams=1)
    process = psutil.Process(server.pid)
    times = process.cpu_times()
    assert times.user + times.system < 2, "seconds of one core until it was ready"
    assert process.memory_info().rss < 150 << 20

    upload = (
        "POST /v1/files HTTP/1.1\nHost: localhost\nContent-Type: multipart/form-data; boundary=b\nConnection: close\n"
    )
    refused = raw(server, f"{upload}Content-Length: {GIGABYTES_10}\nExpect: 100-continue\n\n")
    assert refused.startswith("HTTP/1.1 413 "), "refused before a byte of it was asked for"
    assert "100 Continue" not in refused
    chunk = b"%x\r\n%s\r\n" % (1 << 16, b"x" * (1 << 16))
    endless = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    endless = b"%x\r\n%s\r\n" % (len(endless), endless) + chunk * 17
    refused = raw(server, f"{upload}Transfer-Encoding: chunked\n\n", endless)
    assert "HTTP/1.1 413 " in refused

    for headers in (
        "X-Request-ID: a\n\tb\nHost: localhost",
        "X-Request-ID: a\x00b\nHost: localhost",
        "Host: localhost\nHost: evil.example",
        "Host: localhost\nContent-Length: 5\nTransfer-Encoding: chunked",
        f"Host: localhost\nX-Large: {'x' * 100_000}",
        "No-Host: localhost",
    ):
        answer = raw(server, f"GET /v1/jobs HTTP/1.1\n{headers}\nConnection: close\n\n")
        assert re.match(r"HTTP/1\.1 (400|403|431) ", answer) or "X-Request-ID: a\r\n" not in answer, headers[:40]
        assert answer.count("HTTP/1.1 ") <= 1

    database = Database(database_url)
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Base.metadata.tables["files"])) == 0
    database.dispose()
    folder = tmp_path / "var" / "files"
    assert not folder.exists() or list(folder.iterdir()) == []
    assert "Traceback" not in (tmp_path / "server.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_project_has_so_many_streams_and_a_revoked_key_loses_its_own(start_server, dataset, database_url):
    server = start_server(quota__max_streams=1)
    database = Database(database_url)
    access = Access(database, SystemClock())
    row, text = access.create(name="test", project="alpha", scopes=["submit"], expires_at=None)
    server.http.headers["Authorization"] = f"Bearer {text}"
    first = server.post("/v1/jobs", job_request(dataset, max_steps=5000))
    path = f"/v1/jobs/{first['id']}/events/stream"
    with server.http.stream("GET", path) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("event:") or next(lines)
        refused = server.http.get(path)
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_streams")
        assert refused.headers["retry-after"]
        server.post(f"/v1/jobs/{first['id']}/cancel")
        access.revoke(row.id)
        for _ in lines:
            pass
    assert server.http.get("/v1/jobs").status_code == 401
    database.dispose()
