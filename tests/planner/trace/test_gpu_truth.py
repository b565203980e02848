"""The GPU benchmark where there is no GPU: it runs to its end, and says what it could not check."""

import json

import pytest

from benchmarks import gpu_truth
from benchmarks.gpu_cases import MODELS, TINY, grid, headline
from benchmarks.gpu_histories import simulate

MIB = 2**20


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["gpu_truth", "--device", "cpu", *arguments])
    code = gpu_truth.main()
    return code, capsys.readouterr().out


def test_it_ends_on_the_cpu_and_names_what_is_missing(monkeypatch, capsys, tmp_path):
    output = tmp_path / "truth.json"
    code, printed = run(monkeypatch, capsys, "--cases", "1", "--output", str(output))
    assert code == 0
    assert "not checked" in printed
    first = json.loads(output.read_text())
    (measured,) = first["runs"].values()
    assert len(measured["chunks"]) == 8
    assert 0 <= first["table"]["allocated_mean_absolute"] < 0.01
    assert "a hard limit at the planned bound" in first["not_checked"]

    _, again = run(monkeypatch, capsys, "--cases", "1", "--output", str(output))
    assert "mean 0" not in again  # nothing was measured again
    assert json.loads(output.read_text()) == first


def test_a_recorded_history_is_replayed():
    """Two blocks of 12 MiB and a small one: segments of 12, 12 and 2 MiB, one of them used twice."""
    events = [
        {"action": "segment_alloc", "addr": 1, "size": 12 * MIB}, {"action": "alloc", "addr": 1, "size": 12 * MIB - 7},
        {"action": "segment_alloc", "addr": 2, "size": 12 * MIB}, {"action": "alloc", "addr": 2, "size": 12 * MIB},
        {"action": "free_requested", "addr": 1, "size": 12 * MIB}, {"action": "free_completed", "addr": 1, "size": 12},
        {"action": "alloc", "addr": 1, "size": 12 * MIB},
        {"action": "segment_alloc", "addr": 3, "size": 2 * MIB}, {"action": "alloc", "addr": 3, "size": 100},
        {"action": "free_completed", "addr": 99, "size": 100},
    ]  # fmt: skip
    assert simulate(events) == (26 * MIB, 26 * MIB, 1)


@pytest.mark.parametrize("models", [MODELS, TINY])
def test_the_grid_varies_everything_and_names_are_unique(models):
    cases = list(grid(models))
    assert len({case.name for case in cases}) == len(cases) >= 75
    for attribute in ("seq_len", "micro_batch_size", "activation_checkpointing", "loss"):
        assert len({getattr(case.training, attribute) for case in cases}) > 1
    assert {case.model for case in cases} == set(models)


def test_what_is_measured_first_differs_in_everything_that_matters():
    cases = list(headline())
    assert len({case.name for case in cases}) == len(cases) == 12
    assert {case.training.schedule.num_chunks for case in cases} == {1, 8, 32}
    assert {case.training.method for case in cases} == {"chunkft", "lora"}
    assert {case.training.activation_checkpointing for case in cases} == {"full", "none"}
    assert {case.training.optimizer for case in cases} == {"adamw", "adafactor", "adamw8bit"}
