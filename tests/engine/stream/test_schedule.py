"""Which chunk is when, and at which rate."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkplan.engine import ChunkFT, InputError
from chunkplan.engine.spec import JobTraining, Order, ScheduleSpec
from chunkplan.engine.stream.schedule import Schedule, few_updates_warning, learning_rate, rate_factor
from tests.support.families import tiny_batch, tiny_model


def visited(schedule, num_updates):
    return [schedule.visit(update).chunk_index for update in range(num_updates)]


def test_orders():
    assert visited(Schedule(3, Order.DESCENDING), 6) == [2, 1, 0, 2, 1, 0]
    assert visited(Schedule(3, Order.ASCENDING, switch_every=2), 7) == [0, 0, 1, 1, 2, 2, 0]


def test_random_orders_are_permutations_new_in_every_cycle_and_a_function_of_the_seed():
    schedule = Schedule(16, Order.RANDOM, seed=7)
    cycles = [visited(schedule, 64)[start : start + 16] for start in (0, 16, 32, 48)]
    assert all(sorted(cycle) == list(range(16)) for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) == 4
    assert visited(Schedule(16, Order.RANDOM, seed=7), 64) == visited(schedule, 64)
    assert visited(Schedule(16, Order.RANDOM, seed=8), 64) != visited(schedule, 64)


@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from(list(Order)), st.integers(0, 500))
def test_a_visit_knows_its_first_and_last_update(num_chunks, switch_every, order, update):
    schedule = Schedule(num_chunks, order, switch_every)
    visit, after = schedule.visit(update), schedule.visit(update + 1)
    assert visit.cycle == update // (num_chunks * switch_every)
    assert visit.is_first == (update % switch_every == 0)
    assert visit.is_last == after.is_first
    assert visit.is_last or after.chunk_index == visit.chunk_index


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("num_cycles", "warmup_ratio"), [(1, 0.0), (2, 0.0), (10, 0.0), (10, 0.25), (7, 0.9)])
def test_rates_rise_then_fall_and_end_one_step_above_zero(kind, num_cycles, warmup_ratio):
    rates = [rate_factor(kind, cycle, num_cycles, warmup_ratio) for cycle in range(num_cycles)]
    warmup = int(warmup_ratio * num_cycles)
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1.0
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if kind == "linear":
        # The whole way down: not the 0.75 of a scheduler that steps by cycle but was built for all updates.
        assert rates[-1] == pytest.approx(1 / (num_cycles - warmup))
    if kind != "constant":
        assert rate_factor(kind, num_cycles, num_cycles, warmup_ratio) == pytest.approx(0.0, abs=1e-12)


def rates(num_updates, **values):
    training = JobTraining.model_validate(
        {"learning_rate": 2.0, "schedule": {"num_chunks": 4, "switch_every": 2}, **values}
    )
    return [learning_rate(training.resolved(), update, num_updates) for update in range(num_updates)]


def test_by_update_every_schedule_is_its_closed_formula_and_ends_at_the_last_update():
    n, w = 40, 10
    by_update = {"lr_schedule_by": "update"}
    assert rates(n, lr_schedule="constant", **by_update) == [2.0] * n
    assert rates(n, lr_schedule="linear", **by_update) == pytest.approx([2 * (n - i) / n for i in range(n)])
    cosine = [1 + math.cos(math.pi * i / n) for i in range(n)]
    assert rates(n, lr_schedule="cosine", **by_update) == pytest.approx(cosine)
    rise = [2 * (i + 1) / (w + 1) for i in range(w)]
    warm = {"warmup_ratio": w / n, **by_update}
    assert rates(n, lr_schedule="constant", **warm) == pytest.approx(rise + [2.0] * (n - w))
    assert rates(n, lr_schedule="linear", **warm) == pytest.approx(rise + [2 * (n - i) / (n - w) for i in range(w, n)])
    assert rates(n, lr_schedule="cosine", **warm) == pytest.approx(
        rise + [1 + math.cos(math.pi * (i - w) / (n - w)) for i in range(w, n)]
    )


@pytest.mark.parametrize("num_updates", [40, 37])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.4])
def test_by_cycle_every_chunk_sees_the_rates_of_the_cycles_and_the_last_cycle_is_the_end(
    kind, warmup_ratio, num_updates
):
    found = rates(num_updates, lr_schedule=kind, warmup_ratio=warmup_ratio)
    by_cycle = rates(5, lr_schedule=kind, warmup_ratio=warmup_ratio, lr_schedule_by="update")
    assert found == [by_cycle[update // 8] for update in range(num_updates)]


def test_with_one_chunk_cycles_are_updates():
    for kind in ("constant", "linear", "cosine"):
        dense = {"method": "full", "schedule": {}, "lr_schedule": kind, "warmup_ratio": 0.1}
        assert rates(30, **dense) == rates(30, **dense, lr_schedule_by="update")


def test_a_run_that_hardly_updates_each_parameter_is_told_so():
    warning = few_updates_warning(ScheduleSpec(num_chunks=8, switch_every=2), 16)
    assert warning == (
        "16 updates over 8 chunks change each parameter only about 2 times, too few for most fine-tuning: "
        "use at least 40 updates, at most 3 chunks or expansion 'factored'"
    )
    assert few_updates_warning(ScheduleSpec(num_chunks=8), 39) is not None
    assert few_updates_warning(ScheduleSpec(num_chunks=8), 40) is None
    assert few_updates_warning(ScheduleSpec(num_chunks=3), 16) is None
    assert few_updates_warning(ScheduleSpec(num_chunks=1), 1) is None
    expanded = ScheduleSpec(num_chunks=8, expansion="factored")
    assert few_updates_warning(expanded, 9) is None  # about (8 + 1) / 2 chunks take part in every update
    warning = few_updates_warning(expanded, 8)
    assert warning is not None
    assert "use at least 9 updates" in warning


def test_a_tuner_follows_its_schedule_and_rates():
    rates = []
    with ChunkFT(
        tiny_model("llama"), 3, lr=lambda update: rates.append(update) or 1e-3, order="ascending", switch_every=2
    ) as tuner:
        names = []
        for _ in range(6):
            names.append(tuner.active[0].name)
            tuner.backward(tiny_batch())
            tuner.backward(tiny_batch())
            tuner.step()
    assert rates == list(range(6))
    assert names[0] == names[1] != names[2] == names[3] != names[4] == names[5]
    assert tuner.num_updates == 6


@pytest.mark.parametrize("num_chunks", [0, -3, 10**6])
def test_a_count_of_chunks_that_cannot_be_is_refused(num_chunks):
    with pytest.raises(InputError) as refused:
        ChunkFT(tiny_model("llama"), num_chunks)
    assert refused.value.field == "training.schedule.num_chunks"


def test_what_a_batch_holds_and_training_would_ignore_is_refused():
    batch = tiny_batch()
    right = batch["labels"].clone().fill_(1)
    right[0, -2:] = 0
    with ChunkFT(tiny_model("llama"), 2) as tuner:
        tuner.backward({**batch, "attention_mask": right})
        with pytest.raises(InputError, match=r"^batch.attention_mask: must pad on the right"):
            tuner.backward({**batch, "attention_mask": right.flip(1)})
        with pytest.raises(InputError, match=r"^batch.position_ids: needs the option packing"):
            tuner.backward({**batch, "position_ids": right})
