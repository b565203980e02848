"""AdamW chunk by chunk: torch's own updates, states that come and go, clipping, decay, rounding."""

import gc
import weakref

import pytest
import torch
from torch import nn

from chunkplan.engine import ChunkFT, ParameterStream, activate
from chunkplan.engine.optimizer.chunk_optimizer import ChunkOptimizer, OptimizerConfig
from chunkplan.engine.optimizer.rounding import stochastic_round_
from chunkplan.engine.optimizer.state_layout import BLOCK_NUMEL
from chunkplan.engine.spec import Order
from chunkplan.engine.stream.schedule import Schedule
from tests.support.families import tiny_batch, tiny_model


def batches(count):
    return [tiny_batch(seed=seed) for seed in range(count)]


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def tuned(num_updates, family="llama-tied", dtype=torch.float32, **options):
    """Weights of a model after updates with ChunkFT."""
    model = tiny_model(family, dtype)
    with ChunkFT(model, **options) as tuner:
        for batch in batches(num_updates):
            tuner.backward(batch)
            tuner.step()
    return weights(model)


@pytest.mark.parametrize("family", ["llama-tied", "llama", "gpt2"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_one_chunk_is_torchs_dense_adamw_bit_for_bit(family, max_grad_norm):
    model = tiny_model(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    for batch in batches(20):
        model(**batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum()).loss.backward()
        if max_grad_norm:
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm) > max_grad_norm
        optimizer.step()
        optimizer.zero_grad()
    expected = weights(model)
    options = {"lr": 1e-3, "weight_decay": 0.1, "max_grad_norm": max_grad_norm, "loss": "standard"}
    actual = tuned(20, family, num_chunks=1, **options)
    untrained = weights(tiny_model(family))
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
        assert not torch.equal(tensor, untrained[name])


def reference(num_chunks, num_updates, order="descending", switch_every=1, reset=False):
    """The same schedule with one torch optimizer per chunk whose states never leave (or start anew at each
    visit)."""
    model = tiny_model("llama-tied")
    stream = ParameterStream(model)
    chunks, schedule = stream.partition(num_chunks), Schedule(num_chunks, Order(order), switch_every)
    optimizers = {}
    for update, batch in enumerate(batches(num_updates)):
        visit = schedule.visit(update)
        with activate(model, chunks[visit.chunk_index], stream) as active:
            model(**batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum()).loss.backward()
            if visit.chunk_index not in optimizers or (reset and visit.is_first):
                leaves = [nn.Parameter(s.tensor.detach()) for s in active]
                optimizers[visit.chunk_index] = torch.optim.AdamW(leaves, lr=1e-3, weight_decay=0.01, fused=True)
            optimizer = optimizers[visit.chunk_index]
            for leaf, s in zip(optimizer.param_groups[0]["params"], active, strict=True):
                leaf.grad = s.tensor.grad
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step()
    return weights(model)


@pytest.mark.parametrize("switch_every", [1, 3])
@pytest.mark.parametrize("states", ["keep", "reset"])
@pytest.mark.parametrize("order", ["descending", "ascending"])
def test_states_that_come_and_go_equal_states_that_never_left(order, states, switch_every):
    num_updates = 3 * 4 * switch_every
    expected = reference(4, num_updates, order, switch_every, reset=states == "reset")
    options = {"order": order, "switch_every": switch_every, "states": states}
    actual = tuned(num_updates, num_chunks=4, lr=1e-3, weight_decay=0.01, loss="standard", **options)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_keep_and_reset_differ_from_the_second_cycle_on():
    options = {"num_chunks": 4, "lr": 1e-3}
    kept, reset = (tuned(4, states=states, **options) for states in ("keep", "reset"))
    assert all(torch.equal(kept[name], reset[name]) for name in kept)
    kept, reset = (tuned(8, states=states, **options) for states in ("keep", "reset"))
    assert not any(torch.equal(kept[name], reset[name]) for name in kept)


def test_reset_leaves_nothing_on_the_host_and_keep_leaves_nothing_on_the_device():
    for states in ("keep", "reset"):
        with ChunkFT(tiny_model("llama"), 4, states=states, switch_every=2) as tuner:
            for update, batch in enumerate(batches(5)):
                tuner.backward(batch)
                tuner.step()
                chunks = tuner.optimizer.chunks.values()
                on_device = [index for index, chunk in tuner.optimizer.chunks.items() if chunk.device]
                assert on_device == ([] if update % 2 else [tuner.visit.chunk_index])
            num_held = sum(kept["moment0"].numel() for chunk in chunks for kept in chunk.host.values())
            done = sum(tuner.chunks[index].num_parameters for index in (3, 2))
            assert num_held == (done if states == "keep" else 0)


def test_every_chunk_counts_its_own_updates():
    # One count for all would make the first update of a late chunk up to ten times too small or too large.
    model = tiny_model("llama")
    before = weights(model)
    with ChunkFT(model, num_chunks=6, lr=1e-3, max_grad_norm=None) as tuner:
        for batch in batches(6):
            active = {(s.parameter, s.start, s.stop): s.name for s in tuner.active}
            tuner.backward(batch)
            tuner.step()
            for (parameter, start, stop), name in active.items():
                moved = (parameter.detach().flatten() - before[name].flatten())[start:stop].abs()
                # The first step of Adam is the learning rate, whatever the gradient.
                assert float(moved[moved > 0].median()) == pytest.approx(1e-3, rel=1e-2)
        assert [chunk.num_updates for chunk in tuner.optimizer.chunks.values()] == [1] * 6


def test_an_update_touches_the_active_slices_only():
    model = tiny_model("llama-tied")
    with ChunkFT(model, num_chunks=7, lr=1e-3, weight_decay=0.5) as tuner:
        for batch in batches(7):
            before = weights(model)
            ranges = {}
            for s in tuner.active:
                ranges[s.name] = (s.start, s.stop)
            tuner.backward(batch)
            tuner.step()
            for name, parameter in model.named_parameters():
                changed = (parameter.detach() != before[name]).flatten()
                start, stop = ranges.get(name, (0, 0))
                assert changed[start:stop].any() == (stop > start), name
                changed[start:stop] = False
                assert not changed.any(), name


def test_weight_decay_shrinks_the_active_slice_by_rate_times_decay():
    layer = nn.Linear(4, 6, bias=False)
    chunk = ParameterStream(layer).partition(2)[1]
    before = layer.weight.detach().clone()
    optimizer = ChunkOptimizer(OptimizerConfig(weight_decay=0.5, max_grad_norm=None))
    with activate(layer, chunk) as active:
        (layer(torch.ones(1, 4)) * 0.0).sum().backward()
        optimizer.update(active, Schedule(2).visit(0), 0.1)
    assert torch.equal(layer.weight[:3], before[:3])
    torch.testing.assert_close(layer.weight.detach()[3:], before[3:] * (1 - 0.1 * 0.5))


def test_clipping_sees_the_active_chunk_alone_and_reports_the_norm_before():
    model = tiny_model("llama")
    with ChunkFT(model, num_chunks=5, max_grad_norm=1e-4) as tuner:
        for batch in batches(5):
            tuner.backward(batch)
            expected = float(torch.cat([s.tensor.grad for s in tuner.active]).norm())
            assert tuner.step() == pytest.approx(expected, rel=1e-5)
    with ChunkFT(model, num_chunks=5, max_grad_norm=None) as tuner:
        tuner.backward(tiny_batch())
        assert tuner.step() is None


def test_a_tensor_larger_than_a_block_is_updated_as_one():
    torch.manual_seed(0)
    layer = nn.Linear(64, 70_000, bias=False)
    assert layer.weight.numel() > BLOCK_NUMEL
    twin = nn.Linear(64, 70_000, bias=False)
    twin.load_state_dict(layer.state_dict())
    dense = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    optimizer, schedule = ChunkOptimizer(OptimizerConfig(max_grad_norm=None)), Schedule(1)
    x = torch.randn(2, 64)
    for update in range(3):
        twin(x).square().sum().backward()
        dense.step()
        dense.zero_grad()
        with activate(layer, ParameterStream(layer).partition(1)[0]) as active:
            layer(x).square().sum().backward()
            optimizer.update(active, schedule.visit(update), 1e-3)
    assert torch.equal(layer.weight, twin.weight)


def test_slices_without_a_gradient_stay_and_their_states_leave_with_the_visit():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "sometimes": nn.Linear(3, 3)})
    optimizer, schedule = ChunkOptimizer(OptimizerConfig(states="reset")), Schedule(1, switch_every=2)
    before = model["sometimes"].weight.detach().clone()
    for update, takes_part in enumerate([True, False, False, False]):
        with activate(model, ParameterStream(model).partition(1)[0]) as active:
            x = model["used"](torch.ones(1, 3))
            (model["sometimes"](x) if takes_part else x).sum().backward()
            optimizer.update(active, schedule.visit(update), 1e-2)
        if update == 0:
            assert not torch.equal(model["sometimes"].weight, before)
            before = model["sometimes"].weight.detach().clone()
        assert torch.equal(model["sometimes"].weight, before)
        assert bool(optimizer.chunks[0].device) == (update % 2 == 0)


@pytest.mark.parametrize("value", [1.0, -1.0, 3.0e-5, -2.7, 1e-30, 6.1e4])
def test_stochastic_rounding_is_unbiased_and_lands_on_neighbours(value):
    torch.manual_seed(0)
    low = torch.tensor(value, dtype=torch.bfloat16).float()
    ulp = (torch.nextafter(low.bfloat16(), torch.tensor(float("inf"), dtype=torch.bfloat16)).float() - low).abs()
    for fraction in (0.1, 0.5, 0.9):
        target = low + ulp * fraction * low.sign()
        rounded = stochastic_round_(target.repeat(200_000))
        assert torch.equal(rounded, rounded.bfloat16().float())
        assert len(rounded.unique()) == 2
        # Five standard deviations of the mean of 200 000 draws.
        assert abs(float((rounded.double().mean() - target.double()) / ulp)) < 5 * 0.5 / 200_000**0.5


def test_stochastic_rounding_leaves_bf16_values_alone():
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    values = values[values.isfinite()]
    assert torch.equal(stochastic_round_(values.float()).bfloat16().view(torch.int16), values.view(torch.int16))
    assert stochastic_round_(torch.tensor([float("inf"), -float("inf")])).tolist() == [float("inf"), -float("inf")]


def test_small_updates_of_bf16_weights_are_not_lost():
    layer = nn.Linear(64, 4096, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)  # neighbours are 2^-8 below: rounding to nearest would lose every update of 1e-4
    optimizer, schedule = ChunkOptimizer(OptimizerConfig(max_grad_norm=None)), Schedule(1)
    torch.manual_seed(0)
    for update in range(10):
        with activate(layer, ParameterStream(layer).partition(1)[0]) as active:
            layer(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
            optimizer.update(active, schedule.visit(update), 1e-4)
    assert float(layer.weight.detach().float().mean()) == pytest.approx(1.0 - 10 * 1e-4, abs=2e-5)


def test_moments_of_bf16_weights_are_fp32_and_decay():
    layer = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    optimizer, schedule = ChunkOptimizer(OptimizerConfig(max_grad_norm=None)), Schedule(1)
    seconds = []
    for update in range(50):
        with activate(layer, ParameterStream(layer).partition(1)[0]) as active:
            (layer(torch.ones(1, 4, dtype=torch.bfloat16)) * (update == 0)).sum().backward()
            optimizer.update(active, schedule.visit(update), 1e-4)
        (kept,) = optimizer.chunks[0].host.values()
        assert kept["moment1"].dtype == torch.float32
        seconds.append(float(kept["moment1"][0]))
    assert seconds[-1] == pytest.approx(seconds[0] * 0.999**49, rel=1e-4)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_training_lowers_the_loss(family):
    model, batch = tiny_model(family), tiny_batch()
    with ChunkFT(model, num_chunks=4, lr=1e-2, order="random") as tuner:
        losses = []
        for _ in range(40):
            losses.append(float(tuner.backward(batch)))
            tuner.step()
    assert losses[-1] < 0.5 * losses[0]


def test_a_tuner_and_its_states_are_gone_with_the_last_reference():
    # Without the garbage collector: what a tuner holds is too large to wait for it.
    gc.disable()
    try:
        tuner = ChunkFT(tiny_model("llama"), num_chunks=3, expansion="factored")
        tuner.backward(tiny_batch())
        tuner.step()
        tuner.close()
        watched = weakref.ref(tuner)
        del tuner
        assert watched() is None
    finally:
        gc.enable()
