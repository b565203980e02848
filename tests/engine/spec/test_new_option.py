"""A new option is one change: a line in a spec, and it is everywhere where options are."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
_ASKS = """
import inspect, json, os, tempfile
from chunkplan.engine import ChunkFT
from chunkplan.engine.spec import TrainingSpec
from chunkplan.planner.trace.store import TraceStore
from chunkplan.service.write_openapi import kept_document

schemas = json.loads(kept_document())["components"]["schemas"]
def key(**asked):
    return TraceStore({"model_type": "llama"}, TrainingSpec(**asked), "cuda")._path.name
print(json.dumps({
    "engine": "scratch" in inspect.signature(ChunkFT).parameters,
    "api": sorted(name for name, schema in schemas.items() if "scratch" in schema.get("properties", {})),
    "described": schemas["TrainingSpec"]["properties"]["scratch"].get("description"),
    "keys": [key(), key(scratch=True)],
}))
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the code in which a step has one more option: a field and its line in one file."""
    root = tmp_path_factory.mktemp("changed")
    for name in ("engine", "planner", "service", "migrations", "src"):
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    step = root / "engine" / "spec" / "step.py"
    step.write_text(step.read_text() + '    scratch: bool = False\n    """Whether to scratch."""\n')
    return root


def run(root, *arguments):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root / "src"), "HOME": str(root), "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True).stdout


def test_one_line_in_one_file_reaches_engine_api_and_trace_key(changed):
    found = json.loads(run(changed, "-c", _ASKS))
    assert found["engine"]
    assert {"TrainingSpec", "JobTraining"} <= set(found["api"])
    assert found["described"] == "Whether to scratch."
    assert len(set(found["keys"])) == 2


def test_the_line_is_the_command_lines_help(changed):
    shown = run(changed, "-m", "chunkplan.service.cli", "plan", "--help")
    assert "--scratch" in shown
    assert "Whether to scratch." in shown
