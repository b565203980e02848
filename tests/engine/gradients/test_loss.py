"""The fused loss is the model's own: value and gradients, for every family, label and head."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from chunkplan.engine import ChunkFT, InputError, ParameterStream, activate
from chunkplan.engine.gradients.fused_loss import IGNORE_INDEX, LogitTransform, block_tokens, fused_linear_cross_entropy
from chunkplan.engine.model.tasks import task_of
from chunkplan.engine.record.profiler import CpuProfiler
from chunkplan.engine.training.step import compute_loss, num_counted_tokens
from tests.support.families import (
    FAMILIES,
    UNLISTED,
    batch_for,
    dense_gradients,
    own_loss,
    relative_error,
    tiny_batch,
    tiny_model,
)
from tests.support.memory import held
from tests.support.steps import step_options


def fused_loss(model, batch=None, denominator=None):
    batch = batch or batch_for(model)
    denominator = denominator or float(num_counted_tokens(batch["labels"], task_of(model)))
    return compute_loss(model, batch, denominator, step_options("fused"))


@pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED])
def test_value_and_gradients_are_the_models_own(family):
    model = tiny_model(family)
    own, fused = dense_gradients(model, own_loss), dense_gradients(model, fused_loss)
    assert float(fused_loss(model).detach()) == pytest.approx(float(own_loss(model).detach()), rel=1e-6)
    largest = max(float(gradient.norm()) for gradient in own.values())
    for name, expected in own.items():
        if name.endswith(("k_proj.bias", "key.bias")) and float(expected.norm()) < 1e-8 * largest:
            continue  # zero but for rounding: the softmax does not see a constant added to all keys
        assert relative_error(fused[name], expected) <= 1e-6, name


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_the_gradients_are_at_least_as_exact_as_the_models_own(family):
    model = tiny_model(family, torch.bfloat16)
    own, fused = dense_gradients(model, own_loss), dense_gradients(model, fused_loss)
    exact = torch.cat(list(dense_gradients(model.float(), own_loss).values()))
    own_error, fused_error = (relative_error(torch.cat(list(g.values())), exact) for g in (own, fused))
    assert 0 < fused_error <= 1.01 * own_error < 0.02


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_the_transform_of_the_logits_matters(family):
    # The comparison above would prove nothing about caps and scales that the loss does not feel.
    setting = {"gemma2": "final_logit_softcapping", "cohere": "logit_scale", "granite": "logits_scaling"}[family]
    model = tiny_model(family)
    before = float(fused_loss(model).detach())
    setattr(model.config, setting, getattr(model.config, setting) * 0.02)
    assert abs(float(fused_loss(model).detach()) - before) > 1e-3


@pytest.mark.parametrize("family", ["llama", "llama-tied", "phi", "gemma2", "gpt2"])
def test_a_frozen_whole_or_cut_head_gives_the_dense_gradient(family):
    model = tiny_model(family)
    dense = dense_gradients(model, own_loss)
    stream = ParameterStream(model)
    heads = set()
    for count in (1, 4, 11):
        for chunk in stream.partition(count):
            with activate(model, chunk, stream) as active:
                fused_loss(model).backward()
                weight = model.get_output_embeddings().weight
                heads.add(type(weight).__name__ if weight.requires_grad or hasattr(weight, "rows") else "frozen")
                for s in active:
                    assert relative_error(s.tensor.grad, dense[s.name][s.start : s.stop]) <= 2e-6, s.name
    assert heads == {"frozen", "Parameter", "CutParameter"}


TRANSFORMS = [LogitTransform(), LogitTransform(0.5), LogitTransform(softcap=3.0), LogitTransform(2.0, 3.0)]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_many_blocks_add_up(transform):
    has_bias = transform.scale == 1.0
    vocab_size, num_tokens, width = 33_000, 300, 8
    assert block_tokens(vocab_size) < num_tokens / 2
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator, requires_grad=True)
    weight = nn.Parameter(torch.randn(vocab_size, width, generator=generator))
    bias = nn.Parameter(torch.randn(vocab_size, generator=generator)) if has_bias else None
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    labels[::7] = IGNORE_INDEX
    leaves = [hidden, weight, *([bias] if has_bias else [])]
    exact = reference_loss(hidden, weight, labels, bias, transform, torch.float64)
    torchs = reference_loss(hidden, weight, labels, bias, transform, torch.float32)
    fused = fused_linear_cross_entropy(hidden, weight, labels, 123.0, bias, transform)
    assert float(fused.detach()) == pytest.approx(float(exact.detach()), rel=1e-6)
    gradients = [torch.autograd.grad(loss, leaves) for loss in (fused, torchs, exact)]
    for actual, single, reference in zip(*gradients, strict=True):
        assert relative_error(actual, reference) <= 1.1 * relative_error(single, reference) + 2e-7


def reference_loss(hidden, weight, labels, bias, transform, dtype):
    """What a model computes, with all logits at once."""
    logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)) * transform.scale
    if transform.softcap:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return F.cross_entropy(logits, labels, reduction="sum") / 123.0


def test_ignored_tokens_count_for_nothing():
    model, batch = tiny_model("llama"), tiny_batch()
    other = {"input_ids": batch["input_ids"], "labels": batch["labels"].clone()}
    other["labels"][:, 0] = 5  # the first position is predicted from nothing
    assert num_counted_tokens(other["labels"]) == num_counted_tokens(batch["labels"])
    assert torch.equal(fused_loss(model, other), fused_loss(model, batch))
    nothing = {"input_ids": batch["input_ids"], "labels": torch.full_like(batch["labels"], IGNORE_INDEX)}
    gradients = dense_gradients(model, lambda m: fused_loss(m, nothing, 1.0))
    assert float(fused_loss(model, nothing, 1.0).detach()) == 0.0
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("loss", ["fused", "standard"])
def test_accumulated_micro_batches_equal_one_big_batch(loss):
    big = tiny_batch(num_rows=4)
    big["labels"][2:, 5:] = IGNORE_INDEX  # micro-batches of unequal numbers of counted tokens
    total = num_counted_tokens(big["labels"])
    collected = []
    for parts in (1, 2, 4):
        with ChunkFT(tiny_model("llama-tied"), num_chunks=3, loss=loss) as tuner:
            losses = [
                float(tuner.backward(dict(zip(big, rows, strict=True)), total))
                for rows in zip(*(value.chunk(parts) for value in big.values()), strict=True)
            ]
            collected.append((sum(losses), torch.cat([s.tensor.grad for s in tuner.active])))
    for value, gradient in collected[1:]:
        assert value == pytest.approx(collected[0][0], rel=1e-6)
        assert relative_error(gradient, collected[0][1]) <= 1e-6


def test_logits_of_all_tokens_never_exist():
    vocab_size, num_tokens = 20_000, 512
    model = tiny_model("llama", vocab_size=vocab_size, max_position_embeddings=num_tokens)
    ids = torch.arange(num_tokens)[None]
    peaks = {}
    for loss in ("fused", "standard"):
        profiler = CpuProfiler()
        at_rest = held(profiler)
        with ChunkFT(model, num_chunks=16, loss=loss, observer=profiler) as tuner, profiler.step():
            tuner.backward({"input_ids": ids, "labels": ids})
        peaks[loss] = max(sample.allocated_bytes for sample in profiler.samples) - at_rest
    logits_bytes = 4 * vocab_size * num_tokens
    assert peaks["fused"] < 1.1 * logits_bytes < 2 * logits_bytes <= peaks["standard"]


def test_an_evaluation_makes_no_gradients_and_keeps_one_block_of_logits():
    num_tokens, width, vocab_size = 3 * block_tokens(8000), 600, 8000
    hidden, head = torch.randn(num_tokens, width), nn.Parameter(torch.randn(vocab_size, width))
    labels, profiler = torch.arange(num_tokens), CpuProfiler()
    at_rest = held(profiler)
    with profiler.step(), profiler.phase("evaluation"), torch.no_grad():
        loss = fused_linear_cross_entropy(hidden, head, labels, 1.0)
    assert not loss.requires_grad
    (sample,) = profiler.samples
    block_bytes = 4 * vocab_size * block_tokens(vocab_size)
    assert block_bytes <= sample.allocated_bytes - at_rest < 1.1 * block_bytes < head.nbytes


def test_a_model_whose_own_loss_is_another_is_refused():
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 3.0)
    with pytest.raises(InputError, match=r"^training.loss: 'fused' gives .*; use 'standard'"):
        ChunkFT(model, num_chunks=2)
    with ChunkFT(model, num_chunks=2, loss="standard") as tuner:
        assert float(tuner.backward(tiny_batch())) == pytest.approx(float(own_loss(model).detach()), rel=1e-6)
