"""The checklists of docs/contributing work as they stand: each is followed in a copy of the code."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTES = ROOT / "docs" / "contributing"
_CHANGE = re.compile(
    r"^ *(?:In `(?P<file>[^`]+)`, (?:(?P<where>after|before) `(?P<anchor>[^`]+)`|at the end)"
    r"|New file `(?P<new>[^`]+)`):\n\n(?P<indent> *)```\w+\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@pytest.fixture
def follow(tmp_path):
    """Follows a note in a copy of the code; returns what runs a program there."""
    for name in ("engine", "planner", "service", "migrations", "src"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))

    def program(*arguments):
        environment = {
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(tmp_path / "src"),
            "HOME": str(tmp_path),
            "COLUMNS": "200",
            "CHUNKPLAN_DATA_DIR": str(tmp_path / "var"),
        }
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
        )

    def run(*arguments):
        done = program(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def follow(note, **words):
        text = (NOTES / note).read_text()
        for word, value in words.items():
            text = text.replace(word, value)
        changes = list(_CHANGE.finditer(text))
        assert len(changes) == text.count("```") / 2, "every block says where it goes"
        for change in changes:
            apply(tmp_path, change)
        return run, program

    return follow


def apply(root, change):
    indent = change["indent"]
    code = "".join(line.removeprefix(indent) for line in change["code"].splitlines(keepends=True))
    if change["new"]:
        (root / change["new"]).write_text(code)
        return
    path = root / change["file"]
    lines = path.read_text().splitlines(keepends=True)
    at = len(lines)
    if change["anchor"]:
        (found,) = [number for number, line in enumerate(lines) if line.rstrip("\n") == change["anchor"]]
        at = found + (change["where"] == "after")
    path.write_text("".join([*lines[:at], code, *lines[at:]]))


def test_an_option(follow):
    run, program = follow("an-option.md")
    assert "--max-token-loss" in run("-m", "chunkplan.service.cli", "plan", "--help")
    asks = "import inspect, chunkplan.engine as e; assert 'max_token_loss' in inspect.signature(e.ChunkFT).parameters"
    run("-c", asks)
    refused = program(
        *("-m", "chunkplan.service.cli", "plan", "--model", "gpt2", "--gpu", "rtx-4090"),
        *("--max-token-loss", "3", "--loss", "standard"),
    )
    assert refused.returncode == 2
    assert "training.max_token_loss: a limit of single losses needs the fused loss" in refused.stderr


_TRAINS = """
import torch
from chunkplan.engine import ChunkFT
from chunkplan.planner import PlanRequest, plan
from chunkplan.engine.spec import parse
from transformers import LlamaConfig, LlamaForCausalLM

config = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
request = {"model": {"config": {"model_type": "llama", **config}}, "gpu": "rtx-4090"}
states = []
for optimizer in ("signum", "adamw"):
    schedule = {"num_chunks": 1, "switch_every": 2}
    planned = plan(parse(PlanRequest, {**request, "training": {"optimizer": optimizer, "schedule": schedule}}))
    states.append(planned.peak.host_bytes)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**config))
tuner = ChunkFT(model, num_chunks=2, optimizer="signum", lr=1e-2, switch_every=2)
tokens = torch.randint(0, 64, (2, 16))
losses = []
for _ in range(12):
    losses.append(float(tuner.backward({"input_ids": tokens, "labels": tokens})))
    tuner.step()
assert losses[-1] < losses[0], losses
print(states[0] < states[1])
"""


def test_an_optimizer(follow):
    run, _ = follow("an-optimizer.md")
    assert run("-c", _TRAINS).strip().endswith("True"), "one state is planned as half of what two take"


def test_a_model(follow, tmp_path):
    run, _ = follow("a-model-family.md")
    planned = json.loads(
        run("-m", "chunkplan.service.cli", "plan", "--model", "tiny-example", "--gpu", "rtx-4090", "--json")
    )
    rows = json.loads((tmp_path / "planner" / "catalog" / "models.json").read_text())
    (row,) = [row for row in rows if row["id"] == "tiny-example"]
    assert planned["model"]["num_parameters"] == row["num_parameters"]


def test_a_column(follow, tmp_path):
    newest = max(path.name[:4] for path in (ROOT / "migrations" / "versions").glob("[0-9]*.py"))
    run, _ = follow("a-column.md", REVISION=f"{int(newest) + 1:04}", BEFORE=newest)
    run("-m", "chunkplan.service.cli", "db", "upgrade")
    assert "problems" not in run("-m", "chunkplan.service.cli", "db", "check").replace("no problems", "")
    shown = json.loads(run("-c", "from chunkplan.service.write_openapi import kept_document; print(kept_document())"))
    assert "note" in shown["components"]["schemas"]["JobView"]["properties"]


def test_a_verb(follow):
    run, program = follow("a-cli-verb.md")
    assert run("-m", "chunkplan.service.cli", "count", "gpt2").strip() == "124,439,808"
    assert program("-m", "chunkplan.service.cli", "count", "nobody").returncode == 2


def test_a_setting(follow, tmp_path):
    run, program = follow("a-setting.md")
    assert 'greeting = ""' in run("-m", "chunkplan.service.cli", "serve", "--print-config")
    program_text = "from chunkplan.service.settings import Settings; Settings(greeting='x' * 81)"
    assert "greeting" in program("-c", program_text).stderr


def test_every_note_is_followed():
    notes = {path.name for path in NOTES.glob("*.md")}
    followed = set(re.findall(r'follow\("([^"]+)"', Path(__file__).read_text()))
    assert notes == followed
