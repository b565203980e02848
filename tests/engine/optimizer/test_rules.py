"""Update rules, stored precision of states, and masters of bf16 weights."""

import pytest
import torch
from torch import nn

from chunkplan.engine import InputError, ParameterStream, activate
from chunkplan.engine.optimizer.chunk_optimizer import ChunkOptimizer, OptimizerConfig
from chunkplan.engine.optimizer.rounding import join, split
from chunkplan.engine.spec import Master, Optimizer, StateDtype, TrainingSpec, parse
from chunkplan.engine.stream.schedule import Schedule
from tests.support.updates import gradients
from tests.support.updates import run as feed

RULES = list(Optimizer)
ELEMENTWISE = [rule for rule in RULES if rule is not Optimizer.ADAFACTOR]
EXACT = [rule for rule in ELEMENTWISE if rule is not Optimizer.ADAMW8BIT]
REFUSED = {
    (Optimizer.ADAFACTOR, StateDtype.BF16), (Optimizer.ADAFACTOR, StateDtype.INT8),
    (Optimizer.ADAMW8BIT, StateDtype.FP32), (Optimizer.ADAMW8BIT, StateDtype.BF16),
}  # fmt: skip


def run(*arguments, **options):
    """The layer's weight after the updates."""
    return feed(*arguments, **options)[0]


def torchs_own(rule, parameters):
    return {
        Optimizer.SGD: lambda: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
        Optimizer.ADAGRAD: lambda: torch.optim.Adagrad(parameters, lr=1e-2, eps=1e-8),
        Optimizer.RMSPROP: lambda: torch.optim.RMSprop(parameters, lr=1e-2, alpha=0.999, eps=1e-8),
        Optimizer.ADAMW: lambda: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0),
    }[rule]()


@pytest.mark.parametrize("rule", [rule for rule in EXACT if rule is not Optimizer.LION])
def test_a_rule_is_torchs_own_optimizer(rule):
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    twin = nn.Parameter(weight.clone())
    own = torchs_own(rule, [twin])
    for gradient in gradients(20):
        twin.grad = gradient.clone()
        own.step()
    ours = run(OptimizerConfig(rule=rule, max_grad_norm=None), weight, gradients(20))
    torch.testing.assert_close(ours, twin.detach(), rtol=1e-6, atol=1e-7)


def test_lion_moves_every_weight_by_the_rate_in_the_direction_of_its_momentum():
    weight, (first, second) = torch.zeros(2, 3), gradients(2, (2, 3))
    config = OptimizerConfig(beta1=0.9, beta2=0.99, rule=Optimizer.LION, max_grad_norm=None)
    after = run(config, weight, [first, second])
    momentum = 0.01 * first
    expected = -0.01 * first.sign() - 0.01 * (0.9 * momentum + 0.1 * second).sign()
    torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("rule", RULES)
def test_decay_is_decoupled_in_every_rule(rule):
    weight = torch.ones(2, 3)
    after = run(OptimizerConfig(weight_decay=0.5, rule=rule, max_grad_norm=None), weight, [torch.zeros(2, 3)])
    torch.testing.assert_close(after, weight * (1 - 1e-2 * 0.5))


@pytest.mark.parametrize("rule", ELEMENTWISE)
@pytest.mark.parametrize("num_chunks", [2, 3])
def test_chunks_of_a_tensor_are_updated_as_the_whole_would_be(rule, num_chunks):
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    config = OptimizerConfig(rule=rule, max_grad_norm=None)
    repeated = [gradient for gradient in gradients(5) for _ in range(num_chunks)]
    assert torch.equal(run(config, weight, repeated, num_chunks), run(config, weight, gradients(5)))


def test_split_and_join_keep_every_bit_of_the_master():
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(100_000, generator=generator) * torch.exp2(
        torch.randint(-60, 60, (100_000,), generator=generator)
    )
    ties = exact[:1000].bfloat16().float().view(torch.int32)
    exact[:1000] = (ties + 2**15).view(torch.float32)
    exact[1000:2000] = (ties - 2**15).view(torch.float32)
    rounded, residual = torch.empty_like(exact, dtype=torch.bfloat16), torch.empty(exact.shape, dtype=torch.int16)
    split(exact, rounded, residual)
    assert torch.equal(join(rounded, residual).view(torch.int32), exact.view(torch.int32))
    ulp = exact.abs() * 2.0**-8
    assert ((rounded.float() - exact).abs() <= ulp).all()


@pytest.mark.parametrize(("num_chunks", "switch_every"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("states", ["keep", "reset"])
def test_the_residual_is_an_exact_fp32_master_for_200_updates(num_chunks, switch_every, states):
    start = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    updates = [gradient.bfloat16().float() for gradient in gradients(200)]
    options = {"max_grad_norm": None, "states": states}
    master = run(OptimizerConfig(**options), start.float(), updates, num_chunks, switch_every, lr=1e-4)
    config = OptimizerConfig(**options, master=Master.RESIDUAL)
    rounded = run(config, start, updates, num_chunks, switch_every, lr=1e-4)
    nearest = master.bfloat16()
    # Ties may be rounded away from even, by design; everything else is the nearest value.
    assert ((rounded == nearest) | ((rounded.float() - master).abs() == (nearest.float() - master).abs())).all()
    assert (rounded != start).any()


def test_an_fp32_master_keeps_small_updates_within_a_visit():
    start = torch.ones(4, 4, dtype=torch.bfloat16)
    config = OptimizerConfig(max_grad_norm=None, master=Master.FP32)
    after = run(config, start, [torch.ones(4, 4)] * 40, switch_every=40, lr=1e-3)
    torch.testing.assert_close(after.float(), torch.full((4, 4), 1 - 0.04), rtol=0, atol=2**-8)


def test_bf16_states_take_half_the_host_memory_and_still_decay():
    layer = nn.Linear(4, 4, bias=False)
    optimizer, schedule = ChunkOptimizer(OptimizerConfig(max_grad_norm=None, state_dtype=StateDtype.BF16)), Schedule(1)
    torch.manual_seed(0)
    seconds = []
    for update in range(300):
        with activate(layer, ParameterStream(layer).partition(1)[0]) as active:
            active[0].tensor.grad = torch.full((16,), float(update == 0))
            optimizer.update(active, schedule.visit(update), 1e-4)
        (kept,) = optimizer.chunks[0].host.values()
        assert [moment.dtype for moment in kept.values()] == [torch.bfloat16] * 2
        seconds.append(float(kept["moment1"].float().mean()))
    # Rounding to nearest would keep the first value for ever: 0.999 is less than half a bf16 step from 1.
    assert seconds[-1] == pytest.approx(seconds[0] * 0.999**299, rel=0.05)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state_dtype", StateDtype)
def test_the_layout_is_what_the_optimizer_holds(rule, state_dtype):
    asked = {"rule": rule, "state_dtype": state_dtype}
    if (rule, state_dtype) in REFUSED:
        return
    for master in Master:
        config = OptimizerConfig(**asked, master=master, max_grad_norm=None)
        layer = nn.Linear(300, 5, bias=False, dtype=torch.bfloat16)
        layout = config.layout(layer.weight)
        optimizer, schedule = ChunkOptimizer(config), Schedule(1, switch_every=2)
        with activate(layer, ParameterStream(layer).partition(1)[0]) as active:
            for update, place in enumerate(("device", "host")):
                active[0].tensor.grad = torch.ones(1500, dtype=torch.bfloat16)
                optimizer.update(active, schedule.visit(update), 1e-3)
                held = getattr(optimizer.chunks[0], place)
                sizes = [tensor.nbytes for kept in held.values() for tensor in kept.values()]
                if place == "device":
                    assert sorted(sizes) == sorted(layout.device_bytes(1500, 300))
                else:
                    assert sum(sizes) == layout.host_bytes(1500, 300)


def test_fp32_weights_take_no_master():
    with pytest.raises(InputError) as refused:
        parse(TrainingSpec, {"precision": "fp32", "schedule": {"num_chunks": 2, "master": "residual"}})
    assert "fp32" in refused.value.message
