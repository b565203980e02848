"""The planned update of a chunk: states that pass through, and how many blocks of them at once."""

import pytest

from chunkplan.engine.optimizer.state_layout import BLOCK_NUMEL, StateLayout
from chunkplan.engine.spec import TrainingSpec, parse
from chunkplan.planner import PlanRequest, plan, timeline
from chunkplan.planner.footprint.by_category import NOTHING
from chunkplan.planner.footprint.folded import fold, segment_moments
from chunkplan.planner.trace.layers import NO_COPIES
from chunkplan.planner.trace.slice_update import trace_update
from chunkplan.planner.trace.step_trace import CATEGORIES

STATES = CATEGORIES.index("optimizer_states")


def states_of_update(device_kind, num_blocks, *, comes=True, leaves=True, is_shared=False, **training):
    """(highest, left) bytes of states in the update of one slice, in units of a block's."""
    spec = parse(TrainingSpec, {"schedule": {"num_chunks": 2}, **training}).resolved()
    numel = num_blocks * BLOCK_NUMEL
    options = {"comes": comes, "leaves": leaves, "is_shared": is_shared}
    trace = trace_update(device_kind, numel, 1024, spec, spec.schedule, **options)
    segments = [segment for segment in fold(trace, 1).by_category if segment.phase == "optimizer"]
    ((peak, net),) = segment_moments(segments, NO_COPIES, (), NOTHING)
    per_block = sum(StateLayout.of(spec, spec.schedule).device_bytes(BLOCK_NUMEL, 1024))
    return peak.values[STATES] / per_block, net.values[STATES] / per_block


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion"])
def test_a_slice_on_its_own_holds_two_blocks_states_on_a_gpu_and_one_on_the_cpu(optimizer):
    assert states_of_update("cpu", 5, optimizer=optimizer) == (1, 0)
    assert states_of_update("cuda", 5, optimizer=optimizer) == (2, 0)
    assert states_of_update("rocm", 5, optimizer=optimizer) == (2, 0)
    assert states_of_update("cuda", 1, optimizer=optimizer) == (1, 0)


@pytest.mark.parametrize("device_kind", ["cpu", "cuda"])
def test_states_that_stay_for_a_visit_stay(device_kind):
    assert states_of_update(device_kind, 3, leaves=False) == (3, 3)


def test_in_shared_buffers_a_slice_takes_none_of_its_own():
    assert states_of_update("cuda", 5, is_shared=True) == (0, 0)


@pytest.mark.parametrize(("gpu", "num_blocks"), [("cpu", 1), ("rtx-4090", 2)])
def test_a_plan_counts_the_buffers(gpu, num_blocks):
    config = {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 3,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 256,
    }  # fmt: skip
    training = {"seq_len": 16, "schedule": {"num_chunks": 2}}
    request = PlanRequest.model_validate({"model": {"config": config}, "gpu": gpu, "training": training})
    states = [p.breakdown.optimizer_states for p in timeline(request).points if p.phase == "optimizer"]
    assert max(states) == num_blocks * 2 * 4 * BLOCK_NUMEL
    assert all(p.breakdown.optimizer_states == 0 for p in timeline(request).points if p.phase != "optimizer")
    assert plan(request).peak.phase == "optimizer"


@pytest.mark.parametrize("gpu", ["cpu", "rtx-4090"])
def test_a_dense_plan_with_updates_in_backward_needs_most_of_its_gradients_less(gpu):
    config = {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1000, "tie_word_embeddings": False,
    }  # fmt: skip

    def planned(**more):
        training = {"method": "full", "seq_len": 64, "max_grad_norm": None, "schedule": {"states": "reset"}, **more}
        return plan(PlanRequest.model_validate({"model": {"config": config}, "gpu": gpu, "training": training}))

    after, within = planned(), planned(update_in_backward=True)
    gradients = after.peak.breakdown.gradients
    assert after.peak.allocated_bytes - within.peak.allocated_bytes > 0.8 * gradients
    assert after.peak.reserved_bytes - within.peak.reserved_bytes > 0.7 * gradients
    assert within.peak.reserved_bytes >= within.peak.allocated_bytes
    assert within.step_seconds == pytest.approx(after.step_seconds, rel=0.01)
