"""Bounds that follow what was measured, and plans that name them."""

import json
import random

import pytest

from chunkplan.engine.errors import InputError
from chunkplan.planner import PlanRequest, plan
from chunkplan.planner.calibration.margins import Calibration, Observation, calibration_path, fit, write_calibration

MIB = 2**20


def observation(residual, time_ratio=None, weights=100 * MIB, rest=400 * MIB):
    """A run that took ``residual`` more than planned of what is not weights."""
    return Observation(
        plan_id="plan_1",
        predicted_bytes=weights + rest,
        weights_bytes=weights,
        measured_bytes=weights + rest + round(rest * residual),
        time_ratio=time_ratio,
    )


@pytest.fixture
def calibration_file(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "calibration.json"
    monkeypatch.setenv("CHUNKPLAN_CALIBRATION", str(path))
    return path


def request(gpu="rtx-4090"):
    config = {"model_type": "llama", "vocab_size": 97, "hidden_size": 16, "intermediate_size": 24,
              "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
    training = {"seq_len": 32, "schedule": {"num_chunks": 2}}
    return PlanRequest.model_validate({"model": {"config": config}, "gpu": gpu, "training": training})


@pytest.mark.parametrize("seed", range(5))
def test_no_run_that_was_learned_from_is_above_its_bound(seed):
    generator = random.Random(seed)
    runs = [observation(generator.gauss(0, 0.2)) for _ in range(generator.randint(1, 40))]
    margin = fit("cpu", runs)
    for run in runs:
        assert run.measured_bytes <= margin.bound(run.predicted_bytes, run.weights_bytes)
        assert run.predicted_bytes <= margin.bound(run.predicted_bytes, run.weights_bytes)


def test_the_same_residuals_from_more_runs_give_a_narrower_bound():
    bounds = [fit("cuda", [observation(0.04)] * count).bound(10**9, 10**8) for count in (1, 3, 30)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[-1] > 10**9 + int(0.04 * 9e8)
    assert fit("cuda", []).share == 0.03


def test_times_need_three_runs_and_stay_within_limits():
    assert fit("cuda", [observation(0.0, 2.0)] * 2).time_ratio == 1.0
    assert fit("cuda", [observation(0.0, ratio) for ratio in (1.5, 9.0, 1.6)]).time_ratio == 1.6
    assert fit("cuda", [observation(0.0, 1e6)] * 3).time_ratio == 8.0


def test_a_plan_names_its_calibration_and_changes_with_it(calibration_file):
    before = plan(request())
    assert before.calibration == "default"
    write_calibration(Calibration(devices={"rtx-4090": [observation(0.5, 2.0)] * 3}), calibration_file)
    after = plan(request())
    assert after.calibration not in (None, "default")
    assert after.id != before.id
    assert after.peak.device_bytes == before.peak.device_bytes
    uncertain = after.peak.device_bytes - after.model.parameter_bytes
    assert after.peak.upper_bytes >= after.peak.device_bytes + uncertain // 2
    assert before.step_seconds < after.step_seconds <= 2 * before.step_seconds
    assert plan(request()).id == after.id


def test_other_devices_keep_their_plans(calibration_file):
    before = plan(request("h200"))
    write_calibration(Calibration(devices={"rtx-4090": [observation(0.5)]}), calibration_file)
    assert plan(request("h200")) == before


def test_a_damaged_file_is_named(calibration_file):
    calibration_file.parent.mkdir()
    for content in ("{", json.dumps({"devices": {"cpu": [{"plan_id": "plan_1", "predicted_bytes": -1}]}})):
        calibration_file.write_text(content)
        with pytest.raises(InputError) as refused:
            plan(request())
        assert refused.value.field == "calibration"
        assert str(calibration_file) in refused.value.message
        calibration_file.unlink()


def test_the_file_lies_beside_the_traces_unless_said_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("CHUNKPLAN_CALIBRATION", raising=False)
    monkeypatch.setenv("CHUNKPLAN_CACHE_DIR", str(tmp_path))
    assert calibration_path() == tmp_path / "calibration.json"
