"""fp16: weights rounded without bias, gradients scaled so that they do not vanish, updates skipped that
overflowed."""

import json

import pytest
import torch

from chunkplan.engine import ChunkFT, InputError
from chunkplan.engine.optimizer.loss_scale import MAX_SKIPPED_IN_ROW, LossScale
from chunkplan.engine.optimizer.rounding import stochastic_round_
from chunkplan.engine.spec import RunSpec, TrainingSpec, parse
from chunkplan.engine.training.checkpoint import resume, save_checkpoint
from chunkplan.engine.training.step import evaluate
from chunkplan.engine.training.trainer import Diverged, Trainer
from chunkplan.engine.worker import EXIT_COMPLETED, run_attempt
from tests.support.events import pairs
from tests.support.families import tiny_batch, tiny_model
from tests.support.runs import prepare_run
from tests.support.steps import step_options

TRAINING = {"schedule": {"num_chunks": 2}, "precision": "fp16"}


@pytest.mark.parametrize(
    "value", [1.0003, -1.0003, 3.1e-5, 6.12e-5, 5.5e-8, -2.3e-8, 1e-9, 1000.3, 65503.0, 2.0**-14, 0.0, 6.1e-5 + 1e-8]
)
def test_rounding_is_to_a_neighbour_and_right_on_average(value):
    exact = torch.full((400_000,), value)
    rounded = stochastic_round_(exact.clone(), torch.Generator().manual_seed(0), torch.float16)
    assert torch.equal(rounded.half().float(), rounded)  # values of fp16, subnormals among them
    down = torch.tensor(value).half()
    candidates = {float(down), float(torch.nextafter(down, torch.tensor(float("inf")).half()))}
    candidates |= {float(torch.nextafter(down, torch.tensor(-float("inf")).half()))}
    found = set(rounded.unique().tolist())
    assert found <= candidates
    spacing = max(found) - min(found)
    assert len(found) == (1 if value in (0.0, 2.0**-14) else 2)
    assert abs(float(rounded.double().mean()) - float(exact[0].double())) <= 4 * spacing / 400_000**0.5


def test_rounding_keeps_what_fp16_holds_and_saturates():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    finite = every[every.isfinite()]
    assert torch.equal(stochastic_round_(finite.clone(), None, torch.float16), finite)
    beyond = torch.tensor([65504.0, 65519.0, 7e4, -1e30])
    assert stochastic_round_(beyond, None, torch.float16).tolist() == [65504.0, 65504.0, 65504.0, -65504.0]


def train(model, num_updates, **options):
    """Losses, and which updates were skipped."""
    losses, skipped = [], []
    with ChunkFT(model, num_chunks=4, lr=3e-3, **options) as tuner:
        for _ in range(num_updates):
            losses.append(float(tuner.backward(tiny_batch())))
            tuner.step()
            skipped.append(tuner.was_skipped)
        return losses, skipped, tuner


@pytest.mark.parametrize("loss", ["fused", "standard"])
@pytest.mark.parametrize("options", [{}, {"master": "fp32", "switch_every": 2}, {"optimizer": "adafactor"}], ids=str)
def test_fp16_training_follows_fp32_training(loss, options):
    exact, _, _ = train(tiny_model("llama"), 24, loss=loss, **{k: v for k, v in options.items() if k != "master"})
    losses, skipped, _ = train(tiny_model("llama", torch.float16), 24, loss=loss, **options)
    assert not any(skipped[5:])
    assert losses[-1] < 0.9 * losses[0]
    assert losses[-1] == pytest.approx(exact[-1], abs=0.1)


def test_scaling_keeps_gradients_that_fp16_would_lose():
    model, batch = tiny_model("llama", torch.float16), tiny_batch()
    denominator = 1e7  # gradients of 1e-8, below fp16's smallest number
    lost = {}
    for scale in (1.0, 2.0**16):
        with ChunkFT(model, 1) as tuner:
            tuner.loss_scale.scale = scale
            tuner.backward(batch, denominator)
            gradients = torch.cat([s.tensor.grad for s in tuner.active])
            lost[scale] = float((gradients == 0).float().mean())
    assert lost[2.0**16] < 0.25 < 0.9 < lost[1.0]  # a sixth are rows of tokens that do not occur


def test_clipping_sees_unscaled_gradients():
    norms = {}
    for dtype in (torch.float32, torch.float16):
        with ChunkFT(tiny_model("llama", dtype), 2, max_grad_norm=0.01) as tuner:
            tuner.backward(tiny_batch())
            before = torch.cat([s.tensor.detach().float() for s in tuner.active])
            norms[dtype] = tuner.step()
            assert before.isfinite().all()
    assert norms[torch.float16] == pytest.approx(norms[torch.float32], rel=0.01)


def test_an_overflow_skips_the_update_halves_the_scale_and_moves_the_schedule_on():
    model = tiny_model("llama", torch.float16)
    with ChunkFT(model, 3, lr=1e-3, states="keep") as tuner:
        tuner.loss_scale.scale = 2.0**30
        before = [p.detach().clone() for p in model.parameters()]
        first = tuner.visit.chunk_index
        loss = float(tuner.backward(tiny_batch()))
        assert tuner.step() is None
        assert tuner.was_skipped
        assert loss == pytest.approx(float(tuner.backward(tiny_batch())), rel=1e-6)  # the loss is never scaled
        assert tuner.loss_scale.scale == 2.0**29
        assert tuner.num_updates == 1
        assert tuner.visit.chunk_index != first
        assert tuner.optimizer.chunks[first].num_updates == 0
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        assert all(s.tensor.grad is not None for s in tuner.active)


def test_the_scale_doubles_after_many_clean_updates_and_survives_a_checkpoint(tmp_path):
    model = tiny_model("llama", torch.float16)
    with ChunkFT(model, 2, lr=1e-4) as tuner:
        tuner.loss_scale = LossScale(scale=8.0, growth_interval=3)
        for expected in (8.0, 8.0, 16.0, 16.0):
            tuner.backward(tiny_batch())
            tuner.step()
            assert tuner.loss_scale.scale == expected
        save_checkpoint(tuner, tmp_path, "run", {})
        state = tuner.loss_scale.state()
    with ChunkFT(tiny_model("llama", torch.float16), 2, lr=1e-4) as again:
        resume(again, tmp_path, "run")
        assert again.loss_scale.state() == state == {
            "scale": 16.0, "growth_interval": 3, "num_clean": 1, "num_skipped_in_row": 0,
        }  # fmt: skip


@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"autocast": "fp16"}, {"autocast": "bf16"}], ids=str)
def test_a_run_learns_and_reports_what_it_skipped(settings, tmp_path):
    run = prepare_run(tmp_path, **settings, max_steps=24, learning_rate=1e-2)
    events = []
    assert run_attempt(run, pairs(events), lambda: False) == EXIT_COMPLETED
    steps = [fields for kind, fields in events if kind == "step"]
    evaluations = [fields["loss"] for kind, fields in events if kind == "eval"]
    assert evaluations[-1] < 0.8 * evaluations[0]
    assert sum(step["skipped"] for step in steps) < 6
    assert all((step["grad_norm"] is None) == step["skipped"] for step in steps)


def test_a_run_whose_gradients_always_overflow_is_given_up(tmp_path, monkeypatch):
    run = prepare_run(tmp_path, precision="fp16", max_steps=100)
    spec = json.loads((run / "job.json").read_text())
    trainer = Trainer(parse(RunSpec, spec), run, lambda event: None, lambda: False)
    monkeypatch.setattr(LossScale, "accepts", refuse)
    with pytest.raises(Diverged, match=f"in {MAX_SKIPPED_IN_ROW} updates"):
        trainer.train()
    assert trainer.tuner.num_updates == MAX_SKIPPED_IN_ROW


def refuse(scale, active):
    """As if the gradients overflowed."""
    scale.num_skipped_in_row += 1
    return False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": {"num_chunks": 2, "master": "residual"}}, "exact for bf16 weights only"),
        ({"schedule": {"num_chunks": 2, "expansion": "factored"}}, "expansion updates in backward"),
        ({"update_in_backward": True, "max_grad_norm": None}, "update_in_backward comes before"),
        ({"autocast": "bf16"}, "autocast is for fp32 weights"),
    ],
)
def test_what_fp16_cannot_do_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        parse(TrainingSpec, {**TRAINING, **change})


@pytest.mark.parametrize(
    ("dtype", "options", "field"),
    [
        (torch.float16, {"master": "residual"}, "training.schedule.master"),
        (torch.float16, {"expansion": "factored"}, "training.schedule.expansion"),
        (torch.float16, {"update_in_backward": True, "max_grad_norm": None}, "training.update_in_backward"),
        (torch.bfloat16, {"autocast": "bf16"}, "training.autocast"),
    ],
)
def test_the_tuner_refuses_the_same(dtype, options, field):
    with pytest.raises(InputError) as refusal:
        ChunkFT(tiny_model("llama", dtype), 2, **options)
    assert refusal.value.field == field


@pytest.mark.parametrize("autocast", ["bf16", "fp16"])
@pytest.mark.parametrize("loss", ["fused", "standard"])
def test_autocast_is_the_models_own_loss_under_autocast(autocast, loss):
    model, batch = tiny_model("llama"), tiny_batch()
    with torch.autocast("cpu", {"bf16": torch.bfloat16, "fp16": torch.float16}[autocast]):
        own = float(model(**batch).loss.detach())
    with torch.no_grad():
        plain = float(model(**batch).loss)
    assert own != plain
    with ChunkFT(model, 2, loss=loss, autocast=autocast) as tuner:
        assert float(tuner.backward(batch)) == pytest.approx(own, rel=1e-6)
        value, _ = evaluate(model, [batch], step_options(loss, "none", autocast))
    assert value == pytest.approx(own, rel=1e-6)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
