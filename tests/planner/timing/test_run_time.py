"""From a step to a job: times, energy and cost that a user can check by hand."""

import pytest

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import parse
from chunkplan.planner import PlanRequest, plan
from chunkplan.planner.catalog import find_gpu
from chunkplan.planner.timing.transfers import update_beside_copies
from tests.planner.report.test_exports import TINY


def planned(gpu="rtx-4090", run=None, **training):
    training = {"seq_len": 128, "micro_batch_size": 2, "schedule": {"num_chunks": 4}} | training
    return plan(PlanRequest.model_validate({"model": {"config": TINY}, "gpu": gpu, "training": training, "run": run}))


def test_copies_hide_behind_updates():
    assert update_beside_copies(8.0, 0.0, 0.0, 4, takes_turns=False).steady == 8.0
    slow = update_beside_copies(8.0, 2.0, 2.0, 4, takes_turns=True)
    assert slow.steady == 8.0, "half a way through the device is shorter than an update"
    assert slow.edges == pytest.approx(1.0), "the first block's way in and the last one's way out"
    bound = update_beside_copies(1.0, 8.0, 8.0, 4, takes_turns=True)
    assert bound.steady == pytest.approx(8.5), "two buffers: 17 seconds of work in each of two lanes"
    assert update_beside_copies(1.0, 8.0, 0.0, 4, takes_turns=False).steady == 8.0
    alone = update_beside_copies(1.0, 8.0, 8.0, 1, takes_turns=True)
    assert alone.steady + alone.edges == 17.0, "one block: one after another"


def test_kept_states_cost_their_way_over_the_link():
    kept, reset = (planned(schedule={"num_chunks": 4, "states": states}) for states in ("keep", "reset"))
    states_bytes = 8 * kept.model.num_parameters / 4
    assert kept.step_seconds > reset.step_seconds
    assert kept.step_seconds - reset.step_seconds < 2.2 * states_bytes / find_gpu("rtx-4090").link_bandwidth
    often = planned(schedule={"num_chunks": 4, "switch_every": 8})
    assert reset.step_seconds < often.step_seconds < kept.step_seconds, "one way in and out in eight updates"


def test_a_chunk_is_cheaper_than_a_dense_step():
    answer = planned()
    assert answer.step_seconds < answer.time.dense_step_seconds
    dense = planned(method="full", schedule={"num_chunks": 1})
    assert answer.time.dense_step_seconds <= dense.step_seconds, "whose states travel"
    assert planned(method="lora", schedule={"num_chunks": 1}).time.dense_step_seconds is None


def test_a_job_by_hand():
    answer = planned(run={"dataset_tokens": 1_000_000, "epochs": 2.5}, gradient_accumulation_steps=3)
    time, gpu = answer.time, find_gpu("rtx-4090")
    batches = -(-1_000_000 // 256)
    assert time.num_updates == -(-2.5 * batches // 3)
    assert time.cycle_seconds == pytest.approx(4 * answer.step_seconds)
    assert time.epoch_seconds == pytest.approx(1_000_000 / answer.tokens_per_second)
    assert time.run_seconds == pytest.approx(time.num_updates * answer.step_seconds)
    assert time.energy_kwh == pytest.approx(450 * time.run_seconds / 3.6e6)
    assert time.cost_usd == pytest.approx(gpu.rent_usd_per_hour * time.run_seconds / 3600)


def test_updates_alone_and_devices_without_power_or_rent():
    time = planned("rtx-3070", run={"max_steps": 10}).time
    assert (time.num_updates, time.epoch_seconds, time.cost_usd) == (10, None, None)
    assert time.energy_kwh > 0
    own = {"name": "mine", "memory_bytes": 2**33, "rent_usd_per_hour": 3.6}
    time = planned(own, run={"max_steps": 10, "dataset_tokens": 512}).time
    assert time.energy_kwh is None
    assert time.cost_usd == pytest.approx(time.run_seconds / 1000)
    assert planned().time.run_seconds is None


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({}, "give dataset_tokens, max_steps, or both"),
        ({"epochs": 2}, "give dataset_tokens"),
        ({"max_steps": 3, "epochs": 2}, "not both"),
        ({"dataset_tokens": 0}, "greater than or equal to 1"),
    ],
)
def test_a_length_that_says_nothing_is_refused(run, message):
    with pytest.raises(InputError, match=message) as failure:
        parse(PlanRequest, {"model": "gpt2", "gpu": "cpu", "run": run})
    assert failure.value.field.startswith("run")
