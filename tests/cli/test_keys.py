"""API keys from the command line to the service."""

import json

import pytest

from tests.support.requests import job_request


@pytest.fixture
def key(in_process, database_url):
    def run(*arguments):
        done = in_process("keys", *arguments, "--database-url", database_url)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_key_from_creation_to_revocation(in_process, key, start_server, dataset, monkeypatch, tmp_path):
    """Beyond loopback, where the service would not start without."""
    refused = in_process("serve", "--host", "0.0.0.0", "--data-dir", tmp_path / "var")
    assert (refused.returncode, "is not loopback" in refused.stderr) == (2, True)
    created = json.loads(key("create", "--name", "laptop", "--project", "vision", "--expires", "30d", "--json"))
    assert created["key"] not in key("list") + key("list", "--json")
    assert (created["project"], created["scopes"], created["state"]) == ("vision", ["submit"], "valid")

    server = start_server(host="0.0.0.0")
    monkeypatch.setenv("CHUNKPLAN_URL", str(server.http.base_url))
    stranger = in_process("jobs", "list")
    assert stranger.returncode == 1
    assert "CHUNKPLAN_API_KEY" in stranger.stderr
    monkeypatch.setenv("CHUNKPLAN_API_KEY", created["key"])
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job_request(dataset, max_steps=4)))
    done = in_process("submit", file, "--watch")
    assert done.returncode == 0, done.stderr
    (job,) = json.loads(in_process("jobs", "list", "--json").stdout)
    assert job["state"] == "succeeded"

    assert "is revoked" in key("revoke", created["id"])
    assert in_process("jobs", "list").returncode == 1
    (listed,) = json.loads(key("list", "--project", "vision", "--json"))
    assert (listed["state"], bool(listed["last_used_at"])) == ("revoked", True)
    assert created["key"] not in (tmp_path / "server.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("revoke", "nothing"), "key: there is no key 'nothing'"),
        (("create", "--name", "a", "--scope", "root"), "scope: should be one or more of read, submit, admin"),
        (("create", "--name", "a", "--expires", "soon"), "expires: should be like 30d"),
        (("create", "--name", "a", "--expires", "2020-01-01"), "expires: lies in the past"),
        (("create", "--name", "a", "--project", "A b"), "project: should be lower case"),
        (("list", "--database-url", "nonsense"), "database_url: "),
    ],
)
def test_what_makes_no_sense_is_one_line(in_process, arguments, message):
    done = in_process("keys", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"chunkplan: {message}")
    assert done.stderr.count("\n") == 1


def test_settings_are_printed(in_process):
    done = in_process("serve", "--port", "9000", "--print-config")
    assert (done.returncode, "port = 9000\n" in done.stdout, "[quota]\n" in done.stdout) == (0, True, True)
    assert json.loads(in_process("serve", "--print-config", "--json").stdout)["quota"]["max_streams"] == 200
