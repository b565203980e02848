"""The planned update of one slice: states that pass through, and how many blocks of them at once."""

import pytest

from engine.spec import TrainingSpec, parse
from engine.states import BLOCK_NUMEL, StateLayout
from planner.compose import summarise
from planner.segments import CATEGORIES
from planner.update import trace_update

STATES = CATEGORIES.index("optimizer_states")


def states_at_peak(device_kind, num_blocks, *, comes=True, leaves=True, **training):
    spec = parse(TrainingSpec, {"schedule": {"num_chunks": 2}, **training})
    numel = num_blocks * BLOCK_NUMEL
    trace = trace_update(device_kind, numel, 1024, spec, spec.schedule, comes=comes, leaves=leaves)
    (found,) = [s for s in summarise(trace, (), (numel,), 0, 1) if s.phase == "optimizer"]
    per_block = sum(StateLayout.of(spec, spec.schedule).device_bytes(BLOCK_NUMEL, 1024))
    return found.peak[STATES] / per_block, found.net[STATES] / per_block


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion"])
def test_a_gpu_holds_two_blocks_states_and_the_cpu_one(optimizer):
    assert states_at_peak("cpu", 5, optimizer=optimizer) == (1, 0)
    assert states_at_peak("cuda", 5, optimizer=optimizer) == (2, 0)
    assert states_at_peak("rocm", 5, optimizer=optimizer) == (2, 0)
    assert states_at_peak("cuda", 1, optimizer=optimizer) == (1, 0)


@pytest.mark.parametrize("device_kind", ["cpu", "cuda"])
def test_states_that_stay_for_a_visit_stay(device_kind):
    assert states_at_peak(device_kind, 3, leaves=False) == (3, 3)
