"""The verbs that talk to a running service."""

import json

import pytest


@pytest.fixture
def job_file(tmp_path, dataset):
    job = {
        "name": "sums",
        "model": "smollm2-135m-instruct",
        "gpu": "cpu",
        "training": {
            "seq_len": 64,
            "micro_batch_size": 2,
            "precision": "fp32",
            "learning_rate": 1e-2,
            "max_steps": 8,
            "schedule": {"num_chunks": 4},
        },
        "dataset": {"path": str(dataset), "eval_fraction": 0.1},
    }
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    return path


@pytest.fixture
def service(chunkplan, start_server, monkeypatch):
    server = start_server()
    chunkplan.environment["CHUNKPLAN_URL"] = str(server.http.base_url)
    monkeypatch.setenv("CHUNKPLAN_URL", str(server.http.base_url))
    return server


def test_a_job_from_submission_to_profile(in_process, service, job_file, tmp_path):
    dry = in_process("submit", job_file, "--dry-run")
    assert (dry.returncode, dry.stdout[:18]) == (0, "would be admitted:"), dry.stderr
    assert json.loads(in_process("jobs", "list", "--json").stdout) == []

    submitted = in_process("submit", job_file, "--watch")
    assert submitted.returncode == 0, submitted.stderr
    assert "job running" in submitted.stdout
    assert "held-out loss" in submitted.stdout
    assert "job succeeded (completed)" in submitted.stdout

    (job,) = json.loads(in_process("jobs", "list", "--json").stdout)
    assert job["id"] in in_process("jobs", "list").stdout
    shown = in_process("jobs", "show", job["id"]).stdout
    assert "succeeded (completed)" in shown
    assert "8/8" in shown
    events = [json.loads(line) for line in in_process("jobs", "watch", job["id"], "--json").stdout.splitlines()]
    assert [event["data"]["state"] for event in events if event["type"] == "state"][-1] == "succeeded"

    (profile,) = json.loads(in_process("profiles", "list", "--json").stdout)
    assert profile["id"] in in_process("profiles", "list").stdout
    assert "mean difference" in in_process("profiles", "show", profile["id"]).stdout
    compared = in_process("profiles", "compare", profile["id"], profile["id"])
    assert compared.stdout.count(profile["model"]) == 2

    calibrated = in_process("profiles", "calibrate", "--output", tmp_path / "calibration.json", "--json")
    assert calibrated.returncode == 0, calibrated.stderr
    margin = json.loads(calibrated.stdout)["devices"]["cpu"]
    assert margin["num_runs"] == 1
    assert margin["share"] >= 0.0
    (seen,) = json.loads((tmp_path / "calibration.json").read_text())["devices"]["cpu"]
    assert seen["plan_id"] == profile["plan_id"]
    assert 200 * 2**20 < seen["measured_bytes"] < 2**30  # the trainer's whole process, not its tensors
    assert "cpu" in in_process("profiles", "calibrate", "--output", tmp_path / "calibration.json").stdout

    too_late = in_process("jobs", "cancel", job["id"])
    assert too_late.returncode == 2
    assert too_late.stderr.startswith(f"chunkplan: job {job['id']} is succeeded")


def test_what_does_not_fit_and_what_is_unknown(in_process, service, job_file):
    job = json.loads(job_file.read_text())
    job["gpu"] = {"name": "small", "kind": "cpu", "memory_bytes": 1 << 18}
    job_file.write_text(json.dumps(job))
    refused = in_process("submit", job_file)
    assert refused.returncode == 3
    assert refused.stderr.count("\n") == 1
    for arguments in (("jobs", "show"), ("jobs", "watch"), ("jobs", "cancel"), ("profiles", "show")):
        unknown = in_process(*arguments, "nothing")
        assert unknown.returncode == 2
        assert unknown.stderr.startswith("chunkplan: there is no ")
    assert in_process("jobs", "list", "--state", "sleeping").returncode == 2


def test_nobody_answers(in_process):
    done = in_process("jobs", "list", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "cannot reach http://127.0.0.1:9" in done.stderr
    assert in_process("jobs", "list", "--url", "nonsense").returncode in (1, 2)


def test_the_database_is_upgraded(in_process, tmp_path):
    url = f"sqlite:///{tmp_path / 'new.db'}"
    done = in_process("db", "upgrade", "--database-url", url, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["revision"]
    assert (tmp_path / "new.db").is_file()
    wrong = in_process("db", "upgrade", "--database-url", "nonsense")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("chunkplan: database_url: ")


def test_an_open_host_is_refused(in_process):
    done = in_process("serve", "--host", "0.0.0.0")
    assert done.returncode == 2
    assert "is not loopback" in done.stderr
