"""What must stay light: servers, specs and the command line start without torch."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("engine", "torch transformers"),
        ("chunkplan.engine", "torch transformers"),
        ("chunkplan.engine.data", "torch transformers"),
        ("planner", "torch transformers fastapi sqlalchemy matplotlib"),
        ("chunkplan.service.app", "torch transformers matplotlib"),
        ("chunkplan.service.cli.entry", "torch transformers fastapi sqlalchemy uvicorn matplotlib"),
        ("chunkplan.service.demo.run", "torch transformers matplotlib"),
    ],
)
def test_a_module_imports_nothing_heavy(module, absent):
    assert_absent(module, absent)


def torch_free():
    """What the contracts of pyproject.toml keep free of torch, module by module."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    for contract in contracts:
        if "torch" in contract.get("forbidden_modules", []):
            for name in contract["source_modules"]:
                path = ROOT.joinpath(*name.split(".")[1:])
                files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
                yield from (".".join(["chunkplan", *file.relative_to(ROOT).with_suffix("").parts]) for file in files)


def test_what_is_free_of_torch_by_contract_is_so_when_it_runs():
    names = sorted(torch_free())
    assert len(names) > 50
    assert_absent(", ".join(name.removesuffix(".__init__") for name in names), "torch transformers")


def assert_absent(module, absent):
    code = f"import sys, {module}; print([name for name in {absent.split()} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
