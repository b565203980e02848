"""Adafactor as the optimizer of the active chunk, against transformers' own implementation."""

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from chunkplan.engine import ChunkFT
from chunkplan.engine.optimizer import state_layout as states
from chunkplan.engine.optimizer.chunk_optimizer import OptimizerConfig
from chunkplan.engine.spec import Master, Optimizer
from tests.support.families import tiny_batch, tiny_model
from tests.support.updates import gradients, random_weight, run

CONFIG = {"rule": Optimizer.ADAFACTOR, "max_grad_norm": None}


def transformers_own(parameters, weight_decay=0.0, lr=1e-2):
    return Adafactor(parameters, lr=lr, scale_parameter=False, relative_step=False, weight_decay=weight_decay)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("num_chunks", [1, 2, 3])
def test_every_slice_is_updated_as_transformers_updates_a_tensor_of_its_own(num_chunks, weight_decay):
    weight, updates = random_weight(), [gradient * 10.0**i for i, gradient in enumerate(gradients(12))]
    twins = [nn.Parameter(part.clone()) for part in weight.chunk(num_chunks)]
    own = transformers_own(twins, weight_decay)
    for gradient in updates:
        for twin, part in zip(twins, gradient.chunk(num_chunks), strict=True):
            twin.grad = part.clone()
        own.step()
    repeated = [gradient for gradient in updates for _ in range(num_chunks)]
    ours, _ = run(OptimizerConfig(**CONFIG, weight_decay=weight_decay), weight, repeated, num_chunks)
    torch.testing.assert_close(ours, torch.cat([twin.detach() for twin in twins]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
def test_one_chunk_is_dense_adafactor(family):
    model, twin = tiny_model(family), tiny_model(family)
    own = transformers_own(twin.parameters(), lr=1e-3)
    with ChunkFT(model, 1, 1e-3, optimizer="adafactor", max_grad_norm=None, loss="standard") as tuner:
        for seed in range(5):
            batch = tiny_batch(seed=seed)
            tuner.backward(batch)
            tuner.step()
            twin(**batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum()).loss.backward()
            own.step()
            own.zero_grad()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_blocks_of_rows_share_the_factors_of_their_slice(monkeypatch):
    weight, updates = random_weight(), gradients(5)
    whole, _ = run(OptimizerConfig(**CONFIG), weight, updates)
    monkeypatch.setattr(states, "BLOCK_NUMEL", 20)  # two rows of eight
    monkeypatch.setattr("chunkplan.engine.optimizer.factored.BLOCK_NUMEL", 20)
    in_blocks, optimizer = run(OptimizerConfig(**CONFIG), weight, updates)
    torch.testing.assert_close(in_blocks, whole)
    (kept,) = [kept for kept in optimizer.chunks[0].host.values() if kept]
    assert {name: tensor.numel() for name, tensor in kept.items()} == {"row": 6, "column": 8}


@pytest.mark.parametrize("switch_every", [1, 3])
def test_states_that_come_and_go_equal_states_that_never_left(switch_every):
    weight, updates = random_weight((60, 10)), gradients(6 * switch_every, (60, 10))
    kept, _ = run(OptimizerConfig(**CONFIG), weight, updates, 2, switch_every)
    never_left, _ = run(OptimizerConfig(**CONFIG), weight, updates, 2, switch_every, never_leaves=True)
    assert torch.equal(kept, never_left)


def test_a_residual_is_an_exact_master():
    start = random_weight().bfloat16()
    updates = [gradient.bfloat16().float() for gradient in gradients(50)]
    exact, _ = run(OptimizerConfig(**CONFIG), start.float(), updates, 3, lr=1e-4)
    rounded, _ = run(OptimizerConfig(**CONFIG, master=Master.RESIDUAL), start, updates, 3, lr=1e-4)
    assert ((rounded.float() - exact).abs() <= (exact.bfloat16().float() - exact).abs()).all()
