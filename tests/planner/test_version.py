"""No list kept by hand decides which plans and traces are still valid."""

import importlib.util
import shutil
from pathlib import Path
from typing import Literal

from chunkplan.engine.spec import ResolvedSchedule, TrainingSpec
from chunkplan.planner.trace.store import TraceStore, deciding_an_update

ROOT = Path(__file__).parents[2]
CONFIG = {"model_type": "llama"}


def digest_of(copy):
    """The code digest of a copy of planner/ and engine/, computed by the copy's own module."""
    spec = importlib.util.spec_from_file_location("version_of_the_copy", copy / "planner" / "version.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.code_digest()


def test_every_module_and_table_of_planner_and_engine_is_in_a_plans_id(tmp_path):
    for package in ("planner", "engine"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    digests = [digest_of(tmp_path)]
    files = sorted(path for path in tmp_path.rglob("*") if path.suffix in (".py", ".json"))
    assert len(files) > 100
    for path in files:
        path.write_text(path.read_text() + "\n")
        digests.append(digest_of(tmp_path))
    assert len(set(digests)) == len(files) + 1
    (tmp_path / "engine" / "new.py").touch()
    assert digest_of(tmp_path) not in digests


def test_a_new_field_of_a_training_spec_is_in_the_key_of_traces():
    class Changed(TrainingSpec):
        scratch: bool = False

    keys = {
        TraceStore(CONFIG, training, "cuda")._path for training in (TrainingSpec(), Changed(), Changed(scratch=True))
    }
    assert len(keys) == 3


def test_a_new_field_of_a_schedule_is_in_the_key_of_updates():
    class Changed(ResolvedSchedule):
        scratch: Literal["yes", "no"] = "no"

    assert len({deciding_an_update(each) for each in (ResolvedSchedule(), Changed(), Changed(scratch="yes"))}) == 3


def test_what_decides_nothing_shares_traces():
    plain, other = TrainingSpec(), TrainingSpec(optimizer="lion", max_grad_norm=None, schedule={"num_chunks": 7})
    assert TraceStore(CONFIG, plain, "cuda")._path == TraceStore(CONFIG, other, "cuda")._path
