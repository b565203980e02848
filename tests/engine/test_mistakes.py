"""The mistakes of existing implementations (docs: algorithm.md, last section) that apply here: one test each."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine import ChunkFT, ParameterStream, activate
from engine.coverage import parameter_digests, updated_share
from engine.schedule import rate_factor
from tests.engine.families import FAMILIES, dense_gradients, own_loss, relative_error, tiny_batch, tiny_model


def test_mistake_01_the_gradient_of_rmsnorm_is_rmsnorms():
    model = tiny_model("llama")
    stream = ParameterStream(model)
    index = stream.names.index("model.norm.weight")
    chunk = next(c for c in stream.partition(16) if any(s.index == index for s in c.slices))
    with activate(model, chunk, stream) as active:
        own_loss(model).backward()
        norm = next(s for s in active if s.name == "model.norm.weight")
        gradient = norm.tensor.grad.clone()
    step = 1e-2  # the model computes its loss in fp32; the mistake was 6 to 126 %
    for element in range(4):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                norm.parameter[element] += sign * step
                losses.append(float(own_loss(model)))
                norm.parameter[element] -= sign * step
        assert float(gradient[element]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=0.01)


def test_mistake_02_frozen_layers_keep_no_inputs_and_get_no_weight_gradient():
    layers = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(4)])
    x, saved = torch.randn(64, 32), []
    with activate(layers, ParameterStream(layers).partition(4)[2]):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
            loss = layers(x).sum()
        loss.backward()
    # The active layer's input; the weight above it, through which the gradient passes; nothing else.
    assert sorted(saved) == [(32, 32), (64, 32)]
    assert all(layer.weight.grad is None for layer in layers)


def test_mistake_04_every_chunk_of_a_tensor_has_its_own_step_count():
    model = tiny_model("llama-tied")
    weight = model.get_input_embeddings().weight
    before = weight.detach().clone()
    with ChunkFT(model, num_chunks=32, lr=1e-3, order="ascending", max_grad_norm=None) as tuner:
        for _ in range(3):  # the first three chunks are slices of the embedding
            start, stop = tuner.active[0].start, tuner.active[0].stop
            assert stop - start < weight.numel()
            tuner.backward(tiny_batch())
            tuner.step()
            moved = (weight.detach() - before).flatten()[start:stop].abs()
            assert float(moved[moved > 0].median()) == pytest.approx(1e-3, rel=1e-2)


def test_mistake_05_a_linear_schedule_ends_where_it_should():
    rates = [rate_factor("linear", cycle, 8) for cycle in range(8)]
    assert rates == pytest.approx([1 - cycle / 8 for cycle in range(8)])


@pytest.mark.parametrize("family", FAMILIES)
def test_mistake_07_one_cycle_trains_every_parameter(family):
    model = tiny_model(family)
    before = parameter_digests(model)
    with ChunkFT(model, num_chunks=8, lr=1e-3) as tuner:
        for _ in range(8):
            tuner.backward(tiny_batch())
            tuner.step()
    num_updated, not_updated = updated_share(model, before)
    assert (num_updated, not_updated) == (len(before), [])


def test_mistake_08_no_class_of_torch_is_replaced():
    functions = (F.linear, F.embedding, torch.addmm, nn.Linear.forward, nn.Embedding.forward, nn.Parameter)
    bystander, model = tiny_model("llama", seed=5), tiny_model("llama-tied")
    expected = dense_gradients(bystander, own_loss)
    with ChunkFT(model, num_chunks=7, activation_checkpointing="full") as tuner:
        tuner.backward(tiny_batch())
        actual = dense_gradients(bystander, own_loss)
        assert functions == (F.linear, F.embedding, torch.addmm, nn.Linear.forward, nn.Embedding.forward, nn.Parameter)
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


def test_mistake_10_cuts_around_norms_biases_and_padding_lose_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(9, 6, padding_idx=0),
        nn.LayerNorm(6),
        nn.Linear(6, 5),
        nn.LayerNorm(5),
        nn.Linear(5, 3, bias=False),
    )
    ids = torch.tensor([[[[0, 1], [2, 8]]], [[[3, 0], [5, 5]]]])  # five dimensions inside the network

    def loss_of(m):
        return m(ids).pow(3).sum()

    dense = dense_gradients(model, loss_of)
    stream = ParameterStream(model)
    for count in range(1, sum(info.num_rows for info in stream.infos) + 1):
        for chunk in stream.partition(count):
            with activate(model, chunk, stream) as active:
                loss_of(model).backward()
                for s in active:
                    assert relative_error(s.tensor.grad, dense[s.name][s.start : s.stop]) <= 1e-6, (count, s.name)


def test_mistake_12_accumulation_and_clipping_work_together():
    batches = [tiny_batch(seed=1), tiny_batch(seed=2)]
    both = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    counted = int((both["labels"][:, 1:] != -100).sum())
    results = []
    for parts in ([both], batches):
        model = tiny_model("llama-tied")
        with ChunkFT(model, num_chunks=3, lr=1e-3, max_grad_norm=0.1) as tuner:
            for _ in range(3):
                for batch in parts:
                    tuner.backward(batch, counted)
                assert tuner.step() > 0.1
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert relative_error(results[1], results[0]) <= 1e-5
