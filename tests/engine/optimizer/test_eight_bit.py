"""8-bit optimizer states: what the codes can hold, how they round, and how a run with them compares."""

import pytest
import torch

from chunkplan.engine import ChunkFT, InputError
from chunkplan.engine.optimizer.chunk_optimizer import OptimizerConfig
from chunkplan.engine.optimizer.eight_bit import dequantise, quantise, tables
from chunkplan.engine.spec import Optimizer, StateDtype, TrainingSpec, parse
from chunkplan.engine.training.checkpoint import resume, save_checkpoint
from tests.support.families import tiny_batch, tiny_model
from tests.support.updates import gradients, random_weight, run


def stored(exact, is_signed, seed=0):
    """What is read after ``exact`` was stored."""
    codes, scales = torch.zeros(exact.numel(), dtype=torch.uint8), torch.zeros(exact.numel() // 256)
    quantise(exact.clone(), codes, scales, is_signed, torch.Generator().manual_seed(seed))
    return dequantise(codes, scales, is_signed)


@pytest.mark.parametrize("is_signed", [True, False])
def test_codes_are_the_same_while_a_model_is_built_in_16_bits(is_signed):
    expected = tables(is_signed, torch.device("cpu"))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = tables.__wrapped__(is_signed, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    for name in expected._fields:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("is_signed", [True, False])
def test_zeros_and_the_largest_value_are_kept_exactly(is_signed):
    assert torch.equal(stored(torch.zeros(512), is_signed), torch.zeros(512))
    exact = torch.rand(512, generator=torch.Generator().manual_seed(0)) * 3e-12
    exact[[7, 300]] = torch.tensor([5e-12, 4e-5])
    exact[300:310] *= -1 if is_signed else 1
    assert torch.equal(stored(exact, is_signed)[[7, 300]], exact[[7, 300]])


@pytest.mark.parametrize(("is_signed", "error"), [(True, 0.9 / 64), (False, 0.9 / 128)])
def test_no_value_is_further_off_than_a_level_of_its_decade(is_signed, error):
    exact = torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    exact = exact if is_signed else exact.square()
    largest = exact.view(-1, 256).abs().amax(1).repeat_interleave(256)
    share = exact.abs() / largest
    # Levels are spaced by 0.9 / n of their decade's upper end, to the next bf16 number, and half as many in
    # the next.
    decade = torch.where(share > 0, 10.0 ** share.clamp(min=1e-7).log10().ceil(), 0.0)
    levels_off = (stored(exact, is_signed) - exact).abs() / largest / error
    allowed = decade * (1 / decade.clamp(min=1e-7)).log10().exp2()
    assert (levels_off[share > 1e-6] <= 1.12 * allowed[share > 1e-6]).all()


@pytest.mark.parametrize("is_signed", [True, False])
def test_rounding_keeps_the_mean(is_signed):
    exact = torch.full((256 * 1000,), 0.1234567)
    exact.view(-1, 256)[:, 0] = 1.0
    rest = stored(exact, is_signed).view(-1, 256)[:, 1:].double()
    assert len(rest.unique()) == 2
    # Five standard deviations of the mean of 255 000 draws between two levels.
    spacing = float(rest.max() - rest.min())
    assert abs(float(rest.mean()) - 0.1234567) < 5 * 0.5 * spacing / 255_000**0.5


def test_a_second_moment_that_is_not_zero_never_becomes_zero():
    exact = torch.full((256,), 1e-12)
    exact[0], exact[1] = 1.0, 0.0
    kept = stored(exact, is_signed=False)
    assert kept[1] == 0.0
    assert (kept[2:] > 0).all()
    assert (kept[2:] < 1e-6).all()


def test_a_small_value_beside_a_large_one_still_decays():
    # Rounding to nearest would keep the small one for ever: 0.1 % is less than half a level.
    exact = torch.full((256,), 0.05)
    for update in range(1000):
        exact *= 0.999
        exact[0] = 1.0
        exact = stored(exact, is_signed=False, seed=update)
    assert float(exact[1:].mean()) == pytest.approx(0.05 * 0.999**1000, rel=0.1)


def test_numbers_that_are_not_finite_stay_visible():
    exact = torch.ones(512)
    exact[3] = torch.nan
    kept = stored(exact, is_signed=False)
    assert kept[:256].isnan().all()
    assert torch.equal(kept[256:], torch.ones(256))


@pytest.mark.parametrize("rule", ["adamw", "lion", "adagrad"])
def test_a_run_stays_close_to_one_with_fp32_states(rule):
    final = {}
    for state_dtype in ("fp32", "int8"):
        with ChunkFT(tiny_model("llama-tied"), 3, 3e-3, optimizer=rule, state_dtype=state_dtype, betas=None) as tuner:
            losses = []
            for _ in range(100):
                losses.append(float(tuner.backward(tiny_batch())))
                tuner.step()
        final[state_dtype] = losses[-1]
        assert losses[-1] < 0.9 * losses[0]
    assert final["int8"] == pytest.approx(final["fp32"], rel=0.05)


def test_adamw8bit_is_adamw_with_int8_states():
    def trained(**options):
        model = tiny_model("llama")
        with ChunkFT(model, 3, 1e-3, **options) as tuner:
            for seed in range(6):
                tuner.backward(tiny_batch(seed=seed))
                tuner.step()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    short, long = trained(optimizer="adamw8bit"), trained(state_dtype="int8")
    assert torch.equal(short, long)
    assert not torch.equal(short, trained())
    spec = parse(TrainingSpec, {"optimizer": "adamw8bit", "schedule": {"num_chunks": 2}}).resolved()
    assert spec.schedule.state_dtype is StateDtype.INT8
    assert parse(TrainingSpec, spec.model_dump_json()).resolved() == spec


@pytest.mark.parametrize(
    ("optimizer", "state_dtype"), [("adamw8bit", "fp32"), ("adamw8bit", "bf16"), ("adafactor", "int8")]
)
def test_a_contradicting_state_dtype_is_refused(optimizer, state_dtype):
    with pytest.raises(InputError, match=r"state_dtype.*(adamw8bit|adafactor)"):
        parse(TrainingSpec, {"optimizer": optimizer, "schedule": {"state_dtype": state_dtype}})
    with pytest.raises(InputError, match="state_dtype"):
        ChunkFT(tiny_model("llama"), optimizer=optimizer, state_dtype=state_dtype)


@pytest.mark.parametrize("state_dtype", StateDtype)
@pytest.mark.parametrize("switch_every", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_that_come_and_go_equal_states_that_never_left(state_dtype, switch_every, dtype):
    config = OptimizerConfig(state_dtype=state_dtype, max_grad_norm=None)
    weight, updates = random_weight((60, 10)).to(dtype), gradients(6 * switch_every, (60, 10))
    kept, _ = run(config, weight, updates, 2, switch_every)
    never_left, optimizer = run(config, weight, updates, 2, switch_every, never_leaves=True)
    assert torch.equal(kept, never_left)
    assert not any(chunk.host for chunk in optimizer.chunks.values())


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    def tuned(model):
        return ChunkFT(model, 4, 1e-3, optimizer=Optimizer.ADAMW8BIT, switch_every=2)

    def updated(tuner, first, last):
        for seed in range(first, last):
            tuner.backward(tiny_batch(seed=seed))
            tuner.step()

    whole, cut = tiny_model("llama", torch.bfloat16), tiny_model("llama", torch.bfloat16)
    with tuned(whole) as tuner:
        updated(tuner, 0, 11)
    with tuned(cut) as tuner:
        updated(tuner, 0, 5)
        save_checkpoint(tuner, tmp_path, "same", {})
    resumed = tiny_model("llama", torch.bfloat16)
    with tuned(resumed) as tuner:
        assert resume(tuner, tmp_path, "same").step == 5
        updated(tuner, 5, 11)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
