"""The examples run as they stand, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import tiny_llama, tiny_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with a model, a text and chats."""
    folder = tmp_path_factory.mktemp("material")
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("the title of a metal worker is welder\n" * 40)
    row = json.dumps({"text": "the title of a metal worker is welder"})
    (folder / "rows.jsonl").write_text(f"{row}\n" * 24)
    return folder


def run(tmp_path, name, *arguments):
    """What an example prints, run in a folder of its own with the installed package."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CHUNKPLAN_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_loop_of_ones_own_learns(tmp_path, material):
    lines = run(tmp_path, "own_loop.py", material / "model", material / "text.txt").splitlines()
    losses = [float(line.split()[-1]) for line in lines]
    assert len(losses) == 16
    assert losses[-1] < losses[0]
    assert {line.split()[3] for line in lines} == {"0", "1", "2", "3"}
    assert (tmp_path / "tuned" / "model.safetensors").is_file()


def test_a_table_of_devices(tmp_path, material):
    head, *rows = run(tmp_path, "plan_many.py", material / "model", "rtx-4090", "h200").splitlines()
    assert head.split() == ["GPU", "fits", "chunks", "needs", "of", "tokens/s"]
    assert [row.split()[:2] for row in rows] == [["rtx-4090", "yes"], ["h200", "yes"]]


def test_a_job_without_a_server(tmp_path, material):
    printed = run(tmp_path, "train_a_job.py", material / "model", material / "rows.jsonl")
    assert "Peak memory by chunk" in printed
    assert list((tmp_path / "run" / "artifacts").glob("*/model.safetensors"))
