"""The mistakes of existing implementations (docs: algorithm.md, last section) that apply here:
one test each.
"""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from chunkplan.engine import ChunkFT, InputError, ParameterStream, activate
from chunkplan.engine.optimizer import state_layout as states
from chunkplan.engine.optimizer.chunk_optimizer import ChunkOptimizer, OptimizerConfig
from chunkplan.engine.spec import StateDtype, TrainingSpec, parse
from chunkplan.engine.stream.schedule import Schedule, rate_factor
from chunkplan.engine.training.coverage import parameter_digests, updated_share
from chunkplan.engine.training.step import compute_loss, prepared
from tests.engine.optimizer.test_transfer import Procrastinator
from tests.support.families import FAMILIES, dense_gradients, own_loss, relative_error, tiny_batch, tiny_model
from tests.support.steps import step_options


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


@pytest.mark.parametrize("checkpointing", ["full", "none"])
def test_mistake_03_checkpointing_drops_the_inputs_of_cut_layers_too(checkpointing):
    model, options = tiny_model("llama"), step_options("standard", checkpointing)
    stream, inputs = ParameterStream(model), []
    index = stream.names.index("model.layers.1.mlp.gate_proj.weight")
    chunk = next(c for c in stream.partition(33) if any(s.index == index for s in c.slices))
    assert any(s.numel < stream.infos[s.index].numel for s in chunk.slices)
    projection = model.model.layers[1].mlp.gate_proj
    projection.register_forward_pre_hook(
        lambda module, args: inputs.append(StorageWeakRef(args[0].untyped_storage())) or None
    )
    with prepared(model, options), activate(model, chunk, stream) as active:
        loss = compute_loss(model, tiny_batch(), 1.0, options)
        assert len(inputs) == 1
        assert inputs[0].expired() == (checkpointing == "full")
        loss.backward()
        assert all(s.tensor.grad.any() for s in active)


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


@pytest.mark.parametrize("state_dtype", [StateDtype.BF16, StateDtype.INT8])
def test_mistake_06_second_moments_of_few_bits_decay(state_dtype):
    layer = nn.Linear(16, 16, bias=False)
    optimizer, schedule = ChunkOptimizer(OptimizerConfig(max_grad_norm=None, state_dtype=state_dtype)), Schedule(1)
    rates = []
    for update in range(400):
        before = layer.weight.detach().clone()
        with activate(layer, ParameterStream(layer).partition(1)[0]) as active:
            active[0].tensor.grad = torch.full((256,), 1.0 if update == 0 else 1e-3)
            optimizer.update(active, schedule.visit(update), 1e-3)
        rates.append(float((before - layer.weight.detach()).mean()))
    # exp_avg / sqrt(exp_avg_sq): with a second moment that never decays, the step would stay below half of
    # this.
    first, second = 1e-3, 1e-6 + 0.999**399 * (1.0 - 1e-6) * 0.001
    expected = 1e-3 * first / (second / (1.0 - 0.999**400)) ** 0.5
    assert rates[-1] == pytest.approx(expected, rel=0.1)


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


def test_mistake_09_replicas_whose_gradients_nobody_reduces_are_refused(tmp_path):
    model = tiny_model("llama")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        replica = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(InputError, match="one process") as refusal:
            ChunkFT(replica)
        assert refusal.value.field == "model"
    finally:
        torch.distributed.destroy_process_group()


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


def test_mistake_13_buffers_that_states_stream_through_are_never_reused_early(monkeypatch):
    with pytest.raises(InputError) as refusal:
        parse(TrainingSpec, {"weights": "streamed"})  # weights do not stream yet: states do
    assert refusal.value.field == "weights"
    monkeypatch.setattr(states, "BLOCK_NUMEL", 256)
    results = []
    for is_streaming in (True, False):
        model = tiny_model("llama-tied")
        stream = ParameterStream(model)
        chunks, schedule = stream.partition(3), Schedule(3)
        optimizer = ChunkOptimizer(OptimizerConfig(max_grad_norm=None), Procrastinator())
        resident: dict[int, torch.optim.AdamW] = {}
        for update in range(9):
            visit = schedule.visit(update)
            with activate(model, chunks[visit.chunk_index], stream) as active:
                own_loss(model).backward()
                if is_streaming:
                    optimizer.update(active, visit, 1e-3)
                    continue
                if visit.chunk_index not in resident:
                    leaves = [nn.Parameter(s.tensor.detach()) for s in active]
                    resident[visit.chunk_index] = torch.optim.AdamW(leaves, 1e-3, weight_decay=0.0, fused=True)
                adamw = resident[visit.chunk_index]
                for leaf, s in zip(adamw.param_groups[0]["params"], active, strict=True):
                    leaf.grad = s.tensor.grad
                adamw.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)
