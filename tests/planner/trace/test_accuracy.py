"""What the allocator records in real training runs, against their plans."""

import pytest

from benchmarks.accuracy_cases import CONFIGS, Case, case
from benchmarks.planner_accuracy import compare, measure, summary
from chunkplan.planner import PlanRequest, plan
from chunkplan.planner.calibration.residuals import STEP

CASES = [
    case("llama", precision="fp32"),
    case("llama", precision="bf16", activation_checkpointing="none", num_chunks=4),
    case("llama-tied", precision="bf16", num_chunks=9, gradient_accumulation_steps=2),
    case("llama", loss="standard", attention="eager", num_chunks=3),
    case("llama", switch_every=3, num_chunks=3),
    case("llama", switch_every=2, states="reset", num_chunks=3, max_grad_norm=None),
    case("llama", num_chunks=1, precision="bf16", seq_len=512, micro_batch_size=1),
    case("qwen2", num_chunks=4, micro_batch_size=4, seq_len=64, activation_checkpointing={"layers": [0, 3]}),
    case("llama", optimizer="lion", num_chunks=3, switch_every=2),
    case("llama", precision="bf16", master="residual", state_dtype="bf16", num_chunks=3),
    case("llama", precision="bf16", master="fp32", num_chunks=2, switch_every=3),
    case("llama", precision="bf16", master="residual", optimizer="sgd", states="reset", num_chunks=2, switch_every=2),
    case("llama", optimizer="adamw8bit", num_chunks=3),
    case("llama", optimizer="lion", state_dtype="int8", precision="bf16", num_chunks=2, switch_every=3),
    case("llama-tied", optimizer="adafactor", num_chunks=3),
    case("gpt2", optimizer="adafactor", precision="bf16", master="residual", num_chunks=2, switch_every=2),
    case("llama", expansion="factored", num_chunks=4),
    case("llama-tied", expansion="factored", precision="bf16", num_chunks=5, switch_every=2),
    case("llama", expansion="factored", num_chunks=4, gradient_accumulation_steps=3),
    case("llama", update_in_backward=True, max_grad_norm=None, num_chunks=1),
    case("llama-tied", update_in_backward=True, max_grad_norm=None, num_chunks=3, switch_every=3, precision="bf16"),
    case("gpt2", update_in_backward=True, max_grad_norm=None, num_chunks=4, optimizer="adamw8bit"),
    case("gpt2", num_chunks=4),
    case("gpt2", num_chunks=3, precision="bf16", activation_checkpointing="none"),
    case("gpt_neox", num_chunks=3, precision="bf16"),
    case("opt", num_chunks=3),
    case("falcon", num_chunks=3, activation_checkpointing="none"),
    case("falcon", num_chunks=3, precision="bf16", seq_len=256, micro_batch_size=1),
    case("deepseek_v3", num_chunks=3, activation_checkpointing="none"),
    case("gemma2", num_chunks=3),
    case("llama", num_chunks=2, precision="fp16", seq_len=16, master="fp32", max_grad_norm=None),
    case("llama", num_chunks=3, autocast="bf16"),
    case("llama-tied", num_chunks=3, autocast="bf16", activation_checkpointing="none", loss="standard"),
    case("gpt2", num_chunks=2, autocast="fp16", activation_checkpointing="none", seq_len=16),
    case("mixtral", num_chunks=9, activation_checkpointing="none"),
    case("qwen3_moe", num_chunks=3),
    case("mamba", num_chunks=3, seq_len=32, micro_batch_size=1),
    case("bert", num_chunks=3, gradient_accumulation_steps=2),
    case("t5", num_chunks=3),
    case("bart", num_chunks=3, precision="bf16", activation_checkpointing="none", loss="standard"),
    case("llama", num_chunks=3, packing=True, activation_checkpointing="none", gradient_accumulation_steps=2),
    case("mistral", num_chunks=3, packing=True, precision="bf16"),
    case("gpt2", num_chunks=3, packing=True, attention="eager"),
    case("llama-tied", method="lora", num_chunks=1, gradient_accumulation_steps=2),
    case("gpt2", method="lora", num_chunks=1, precision="bf16", activation_checkpointing="none"),
    case("phi3", method="lora", num_chunks=1, precision="bf16", lora={"rank": 64, "dropout": 0.1}),
]


@pytest.mark.parametrize("item", CASES, ids=lambda item: item.name)
def test_plan_predicts_the_allocators_record(item: Case):
    found = compare(item)
    steps = [residual for residual in found if residual.phase == STEP]
    assert len(steps) == item.training.schedule.num_chunks
    figures = summary(found)
    assert figures["mean_absolute"] < 0.005
    assert figures["max_under"] > -0.001
    assert figures["max_over"] < 0.03


def test_plan_of_another_run_does_not_match():
    """The comparison can fail: an eighth of the sequence length is another footprint."""
    item = case("llama", num_chunks=4, activation_checkpointing="none", seq_len=512)
    other = case("llama", num_chunks=4, activation_checkpointing="none", seq_len=64)
    answer = plan(PlanRequest(model={"config": CONFIGS["llama"]}, gpu="cpu", training=other.training))
    measured = max(sample.allocated_bytes for sample in measure(CONFIGS["llama"], item.training))
    assert answer.peak.allocated_bytes < 0.8 * measured
