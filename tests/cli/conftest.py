"""The real command in a process of its own."""

import os
import subprocess
import sys

import pytest

from chunkplan.service.cli import main
from chunkplan.service.cli.output import console


class Command:
    """Runs ``chunkplan`` with the tests' trace cache and data."""

    def __init__(self, environment):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CHUNKPLAN_")}
        self.environment = inherited | {"OMP_NUM_THREADS": "1"} | environment

    def __call__(self, *arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "chunkplan.service.cli", *map(str, arguments)],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def start(self, *arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "chunkplan.service.cli", *map(str, arguments)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def chunkplan(trace_cache, tmp_path, models_dir):
    return Command(
        {
            "CHUNKPLAN_CACHE_DIR": str(trace_cache),
            "CHUNKPLAN_DATA_DIR": str(tmp_path / "var"),
            "CHUNKPLAN_MODELS_DIR": str(models_dir),
        }
    )


@pytest.fixture
def database_url(tmp_path):
    """One engine is enough here: what the command shows does not depend on it."""
    return f"sqlite:///{tmp_path / 'cli.db'}"


@pytest.fixture
def in_process(chunkplan, monkeypatch, capsys):
    """The command in this process: for what ends before anything heavy is imported."""
    for name, value in chunkplan.environment.items():
        if name.startswith("CHUNKPLAN_"):
            monkeypatch.setenv(name, value)
    console.cache_clear()  # it holds the standard output of an earlier test

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        console.cache_clear()
        output, errors = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, output, errors)

    return run
