"""Does the service keep to its own description? Thousands of requests made up from it, with a key and
without.

``make contract`` runs it: a live server with one finished job, and schemathesis with every check.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support.live import TRAINING, LiveServer
from tests.support.model import write_chats, write_tiny_model

RESULT = Path(__file__).parent / "results" / "contract.json"
MODEL = "smollm2-135m-instruct"
ANSWER_SECONDS = 10
"""An answer that takes longer is a failure."""
PLAN_SECONDS = 150
"""Unless it may need a plan of something that was never traced, on a machine that may be busy."""
PLANNING = {"POST": "^/v1/(plans|plans/compare|jobs|fine_tuning/jobs)$", "GET": "^/v1/plans/.*/timeline$"}
"""Paths of answers that may need one, by method."""


def main() -> int:
    """Both runs; 1 if anything was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=50, help="per operation, besides those of the coverage phase")
    arguments = parser.parse_args()
    options = ["--phases", "examples,coverage,fuzzing", "--max-examples", str(arguments.examples)]
    with tempfile.TemporaryDirectory() as folder:
        runs = check(Path(folder), options)
    print(json.dumps(runs, indent=1))
    if all(run["cases"] for run in runs.values()):
        RESULT.write_text(json.dumps(runs, indent=1) + "\n")
    return 0 if all(run["exit_code"] == 0 for run in runs.values()) else 1


def check(folder: Path, options: list[str]) -> dict[str, Any]:
    """What schemathesis found about a live server, with a key and without.

    Args:
        folder: empty, for the server's data.
        options: of ``st run``: how much to try.
    """
    write_tiny_model(folder / "models" / MODEL)
    write_chats(folder / "data.jsonl", num_rows=16)
    environment = {
        "CHUNKPLAN_DATA_DIR": str(folder / "var"),
        "CHUNKPLAN_MODELS_DIR": str(folder / "models"),
        "CHUNKPLAN_CACHE_DIR": str(folder / "traces"),
        "CHUNKPLAN_DATASET_ROOTS": json.dumps([str(folder)]),
        "CHUNKPLAN_QUOTA__REQUESTS_PER_SECOND": "1e6",
        "CHUNKPLAN_QUOTA__REQUESTS_BURST": "1000000",
        "CHUNKPLAN_REFUSALS_PER_SECOND": "1e6",
        "CHUNKPLAN_REFUSALS_BURST": "1000000",
        "CHUNKPLAN_PLAN_TIMEOUT_SECONDS": "600",
    }
    command = [sys.executable, "-m", "chunkplan.service.cli", "keys", "create", "--name", "contract"]
    command += ["--scope", "submit", "--scope", "admin", "--json"]
    key = json.loads(subprocess.check_output(command, env=os.environ | environment))["key"]
    server = LiveServer(environment, folder / "server.log")
    server.http.timeout = 600  # the first plan traces, on machines that may be busy
    try:
        server.wait_until_ready()
        server.http.headers["Authorization"] = f"Bearer {key}"
        config = folder / "schemathesis.toml"
        config.write_text(_config(_one_of_everything(server, folder / "data.jsonl")))
        header = ["--header", f"Authorization: Bearer {key}"]
        return {name: _run(server, config, [*given, *options]) for name, given in (("key", header), ("no key", []))}
    finally:
        server.close()


def _one_of_everything(server: LiveServer, data: Path) -> dict[str, str]:
    body = {
        "name": "contract",
        "model": MODEL,
        "dataset": {"path": str(data)},
        "training": {**TRAINING, "max_steps": 4},
    }
    job = server.wait_for_state(server.post("/v1/jobs", body)["id"], "succeeded")
    upload = server.http.post("/v1/files", files={"file": ("data.jsonl", data.read_bytes())}).json()
    return {
        "job_id": job["id"],
        "plan_id": job["plan_id"],
        "profile_id": job["profile_id"],
        "file_id": upload["id"],
        "name": "config.json",
    }


def _config(parameters: dict[str, str]) -> str:
    """Two answers that no schema can tell: a catalog does not know a name, and a form's ``null`` is four
    letters.
    """
    lines = ["[parameters]", *(f'"path.{name}" = "{value}"' for name, value in parameters.items())]
    accepted = ["2xx", "3xx", "401", "403", "404", "409", "422", "429"]
    lines += ["", "[checks]", f"max_response_time = {ANSWER_SECONDS}"]
    lines += ["", "[checks.positive_data_acceptance]", f"expected-statuses = {json.dumps(accepted)}"]
    refused = ["201", "400", "401", "403", "404", "405", "406", "409", "413", "415", "422", "428", "429"]
    lines += ["", "[[operations]]", 'include-path = "/v1/files"', 'include-method = "POST"']
    lines += ["", "[operations.checks.negative_data_rejection]", f"expected-statuses = {json.dumps(refused)}"]
    for method, paths in PLANNING.items():
        lines += ["", "[[operations]]", f"include-path-regex = '{paths}'", f'include-method = "{method}"']
        lines += ["", "[operations.checks]", f"max_response_time = {PLAN_SECONDS}"]
    return "\n".join(lines) + "\n"


def _run(server: LiveServer, config: Path, options: list[str]) -> dict[str, Any]:
    tool = Path(sys.executable).with_name("st")
    command = [str(tool), "--config-file", str(config), "run", f"{server.http.base_url}/openapi.json", *options]
    command += ["--checks", "all", "--continue-on-failure", "--no-color"]
    command += ["--request-timeout", str(PLAN_SECONDS + 20), "--suppress-health-check", "all"]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    cases = re.search(r"(\d+) generated", done.stdout)
    return {
        "cases": int(cases[1]) if cases else 0,
        "failures": re.findall(r"❌ (ST\d+ .*)", done.stdout),
        "exit_code": done.returncode,
        "seconds": round(time.monotonic() - begin),
    }


if __name__ == "__main__":
    sys.exit(main())
