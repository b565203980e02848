"""Landscape expansion: what lies above the active chunk takes a factored step in the same backward pass."""

import pytest
import torch

from chunkplan.engine import ChunkFT, InputError
from chunkplan.engine.optimizer.expansion import Expansion
from chunkplan.engine.spec import TrainingSpec, parse
from chunkplan.engine.training.checkpoint import resume, save_checkpoint
from tests.support.families import tiny_batch, tiny_model


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_everything_above_the_chunk_moves_and_nothing_below(family, checkpointing):
    model = tiny_model(family)
    options = {"order": "ascending", "expansion": "factored", "activation_checkpointing": checkpointing}
    with ChunkFT(model, 5, 1e-3, **options) as tuner:
        for update in range(5):
            before = weights(model)
            first = tuner.chunks[update].slices[0]
            inside = {tuner.stream.names[piece.index] for piece in tuner.chunks[update].slices}
            tuner.backward(tiny_batch(seed=update))
            tuner.step()
            for index, name in enumerate(tuner.stream.names):
                moved = not torch.equal(before[name], weights(model)[name])
                assert moved == (name in inside or index > first.index), name
        assert all(parameter.grad is None for parameter in model.parameters())


def test_the_active_chunks_gradient_is_the_same_with_and_without():
    found = []
    for expansion in ("none", "factored"):
        with ChunkFT(tiny_model("llama"), 4, order="random", expansion=expansion) as tuner:
            tuner.backward(tiny_batch())
            found.append([piece.tensor.grad.clone() for piece in tuner.active])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_step_is_the_rate_in_root_mean_square_and_follows_the_gradients_sign():
    parameter = torch.nn.Parameter(torch.zeros(6, 8))
    expansion = Expansion([("w", parameter)])
    expansion.learning_rate = 0.01
    expansion.watch("w", parameter)
    direction = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    (parameter * direction).sum().backward()
    assert parameter.grad is None
    assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(0.01, rel=0.2)
    assert torch.equal(parameter.detach().sign(), -direction.sign())


def test_rank_one_gradients_are_normalised_exactly():
    # Squares of a rank-one matrix are the product of their row and column means: every weight moves by the
    # rate.
    parameter = torch.nn.Parameter(torch.zeros(5, 7))
    expansion = Expansion([("w", parameter)])
    expansion.learning_rate = 0.01
    expansion.watch("w", parameter)
    (parameter * torch.outer(torch.arange(1.0, 6.0), torch.arange(1.0, 8.0))).sum().backward()
    torch.testing.assert_close(parameter.detach(), torch.full((5, 7), -0.01))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expansion_learns_faster_than_the_chunk_alone(dtype):
    final = {}
    for expansion in ("none", "factored"):
        torch.manual_seed(0)
        model = tiny_model("llama-tied", dtype)
        with ChunkFT(model, 8, 3e-3, order="random", expansion=expansion, expansion_lr=3e-3) as tuner:
            for _ in range(24):
                loss = tuner.backward(tiny_batch())
                tuner.step()
        final[expansion] = float(loss)
    assert final["factored"] < 0.8 * final["none"]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    def tuned(model):
        return ChunkFT(model, 4, 1e-3, order="random", switch_every=2, expansion="factored")

    whole, cut = tiny_model("llama"), tiny_model("llama")
    with tuned(whole) as tuner:
        for update in range(9):
            tuner.backward(tiny_batch(seed=update))
            tuner.step()
    with tuned(cut) as tuner:
        for update in range(5):
            tuner.backward(tiny_batch(seed=update))
            tuner.step()
        save_checkpoint(tuner, tmp_path, "same", {})
    resumed = tiny_model("llama")
    with tuned(resumed) as tuner:
        assert resume(tuner, tmp_path, "same").step == 5
        for update in range(5, 9):
            tuner.backward(tiny_batch(seed=update))
            tuner.step()
    assert all(torch.equal(weights(whole)[name], tensor) for name, tensor in weights(resumed).items())


def test_accumulated_gradients_are_of_the_same_weights_and_only_the_last_one_expands():
    def micro_batches():
        return [tiny_batch(seed=seed) for seed in range(3)]

    found = []
    for expansion in ("none", "factored"):
        model = tiny_model("llama")
        before = weights(model)
        with ChunkFT(model, 4, 1e-3, order="ascending", expansion=expansion) as tuner:
            for seed, batch in enumerate(micro_batches(), start=1):
                assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())
                tuner.backward(batch, 60.0, is_last=seed == 3)
            found.append([piece.tensor.grad.clone() for piece in tuner.active])
            inside = {piece.name for piece in tuner.active}
        moved = {name for name, tensor in weights(model).items() if not torch.equal(before[name], tensor)}
        assert moved == (set(before) - inside if expansion == "factored" else set())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_micro_batch_after_the_last_one_is_refused():
    with ChunkFT(tiny_model("llama"), 4, 1e-3, order="ascending", expansion="factored") as tuner:
        tuner.backward(tiny_batch())
        with pytest.raises(InputError, match="is_last=False"):
            tuner.backward(tiny_batch())
        tuner.step()
        tuner.backward(tiny_batch())


def test_residual_masters_are_refused():
    with pytest.raises(InputError, match="residual"):
        parse(TrainingSpec, {"schedule": {"expansion": "factored", "master": "residual"}})
