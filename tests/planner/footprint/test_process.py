"""The bound of a plan on the CPU, as it comes with the planner, against real trainer processes."""

import pytest

from benchmarks.accuracy_cases import Case, case
from benchmarks.trainer_process import measure, planned

CASES = [
    case("qwen2", num_chunks=2),
    case("llama", num_chunks=3, precision="bf16", activation_checkpointing="none", seq_len=512, loss="standard"),
    case("gpt2", num_chunks=1, method="lora"),
]


@pytest.mark.parametrize("item", CASES, ids=lambda item: item.name)
def test_no_trainer_takes_more_than_its_bound_nor_much_less(item: Case, monkeypatch, tmp_path):
    monkeypatch.setenv("CHUNKPLAN_CALIBRATION", str(tmp_path / "none.json"))
    answer = planned(item)
    assert answer.calibration != "default"
    measured = measure(item)["process_bytes"]
    assert measured <= answer.peak.upper_bytes <= 1.08 * measured
    assert abs(answer.peak.device_bytes - measured) < 0.03 * measured
