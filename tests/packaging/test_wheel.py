"""The wheel beside a project that has folders of the same names, and by its short names elsewhere."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("engine", "planner", "service", "migrations", "src")
FILES = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE")
CONFIG = {
    "model_type": "llama", "vocab_size": 211, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
OWN = "def name():\n    return 'the project'\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of exactly those files that the Dockerfile copies."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in PARTS:
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in FILES:
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-build-isolation", "--wheel-dir", folder, source], check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with what the wheel holds, to come first on the path."""
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run(installed, folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CHUNKPLAN_", "PYTHON"))}
    environment |= {"PYTHONPATH": str(installed), "CHUNKPLAN_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def test_the_dockerfile_copies_what_the_wheel_is_made_of():
    copied = {line.split()[1] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")}
    assert set(PARTS) <= copied
    (files,) = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY pyproject")]
    assert set(FILES) <= set(files.split())


def test_it_takes_three_names_and_brings_its_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"chunkplan", "engine", "planner"}
    data = {
        f"chunkplan/{path.relative_to(ROOT)}"
        for package in ("engine", "planner", "service", "migrations")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert data | {"chunkplan/py.typed"} <= names


def test_a_project_with_the_same_folders_uses_both(installed, tmp_path):
    for name in ("engine", "planner", "service", "migrations"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(OWN)
    code = (
        "import engine, planner, service, migrations, chunkplan\n"
        "print({module.name() for module in (engine, planner, service, migrations)}, chunkplan.__file__)\n"
        "from chunkplan.planner import PlanRequest, plan\n"
        f"print(plan(PlanRequest(model={{'config': {CONFIG!r}}}, gpu='rtx-4090', training={{'seq_len': 16, 'schedule': "
        "{'num_chunks': 2}})).fits)\n"
    )
    names, fits = run(installed, tmp_path, "-c", code).splitlines()
    assert names == f"{{'the project'}} {installed / 'chunkplan' / '__init__.py'}"
    assert fits == "True"
    run(installed, tmp_path, "-m", "chunkplan.service.cli", "db", "upgrade", "--data-dir", str(tmp_path / "var"))
    assert (tmp_path / "var" / "chunkplan.db").is_file()
    assert "--run-dir" in run(installed, tmp_path, "-m", "chunkplan.engine.worker", "--help")


def test_elsewhere_the_short_names_are_the_same_objects(installed, tmp_path):
    code = (
        "from planner import GpuSpec, Plan, PlanRequest, Timeline, plan, timeline\n"
        "from engine import ActiveSlice, Chunk, ChunkFT, InputError, ParameterStream, activate\n"
        "import chunkplan.engine, chunkplan.planner\n"
        "print(plan is chunkplan.planner.plan, ChunkFT is chunkplan.engine.ChunkFT, Chunk is chunkplan.engine.Chunk)\n"
    )
    assert run(installed, tmp_path, "-c", code) == "True True True\n"
    assert "--run-dir" in run(installed, tmp_path, "-m", "engine.worker", "--help")


def test_from_the_checkout_the_short_names_are_the_same_objects_too():
    code = (
        "import planner; from planner import plan; from engine import ChunkFT; "
        "import chunkplan.planner, chunkplan.engine; "
        "print(planner.__file__, plan is chunkplan.planner.plan, ChunkFT is chunkplan.engine.ChunkFT)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [str(ROOT / "planner" / "__init__.py"), "True", "True"]
