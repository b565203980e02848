"""Chunks' gradients are slices of the dense gradients, whatever the operation; test_exactness has the
families."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from chunkplan.engine import ParameterStream, activate
from chunkplan.engine.gradients import cut_parameter as cut
from chunkplan.engine.record.profiler import CpuProfiler
from chunkplan.engine.training.step import Unobserved, forward_backward, prepared
from tests.support.families import dense_gradients, own_loss, relative_error, tiny_batch, tiny_model
from tests.support.steps import step_options

COUNTS = (1, 5, 16)


def chunk_gradients(model, chunk, loss_of, stream=None):
    """{(name, start, stop): gradient} of one chunk, and whether one of its tensors is cut."""
    with activate(model, chunk, stream) as active:
        loss = loss_of(model)
        if loss.requires_grad:  # not when none of the chunk's rows was looked up
            loss.backward()
        gradients = {
            (s.name, s.start, s.stop): torch.zeros_like(s.tensor) if s.tensor.grad is None else s.tensor.grad
            for s in active
        }
        return gradients, any(s.stop - s.start < s.parameter.numel() for s in active)


def assert_chunks_match(model, loss_of, counts=COUNTS, tolerance=1e-6):
    dense = dense_gradients(model, loss_of)
    assert any(gradient.any() for gradient in dense.values())
    stream = ParameterStream(model)
    for count in counts:
        seen = set()
        for chunk in stream.partition(count):
            gradients, is_cut = chunk_gradients(model, chunk, loss_of, stream)
            for (name, start, stop), actual in gradients.items():
                expected = dense[name][start:stop]
                if not is_cut:
                    assert torch.equal(actual, expected), (count, name)
                assert relative_error(actual, expected) <= tolerance, (count, name, start, stop)
                seen.add(name)
        assert seen == set(stream.names)


@pytest.mark.parametrize(
    ("family", "rates"),
    [("opt", {"dropout": 0.3}), ("qwen2", {"attention_dropout": 0.3}), ("gpt2", {"resid_pdrop": 0.3})],
)
def test_recomputed_layers_drop_the_same_units(family, rates):
    # OPT and the attention of most families call F.dropout: no nn.Dropout betrays it.
    model, batch, gradients = tiny_model(family, **rates), tiny_batch(), []
    for checkpointing in ("none", "full"):
        options = step_options("standard", checkpointing)
        chunk = ParameterStream(model).partition(1)[0]
        with prepared(model, options), activate(model, chunk) as active:
            torch.manual_seed(3)
            forward_backward(model, batch, 17.0, options, Unobserved())
            gradients.append(torch.cat([s.tensor.grad for s in active]))
    assert torch.equal(*gradients)


class Lookup(nn.Module):
    """An embedding with a padding row, 3-D input, and a projection."""

    def __init__(self, padding_idx):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(12, 6, padding_idx=padding_idx)
        self.out = nn.Linear(6, 5)

    def forward(self):
        ids = torch.tensor([[[0, 1, 11], [7, 7, 3]], [[7, 10, 3], [0, 4, 11]]])
        return self.out(self.table(ids)).square().sum()


@pytest.mark.parametrize("padding_idx", [None, 0, 7, -1])
def test_the_padding_row_of_an_embedding_gets_no_gradient(padding_idx):
    model = Lookup(padding_idx)
    assert_chunks_match(model, lambda m: m(), counts=(1, 2, 3, 5))
    if padding_idx is not None:
        assert not dense_gradients(model, lambda m: m())["table.weight"].view(12, 6)[padding_idx].any()


class Unusual(nn.Module):
    """Uses its weights in ways that no sliced function knows."""

    def __init__(self, use):
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.weight = nn.Parameter(torch.randn(8, 6))
        if use == "convolution":
            self.convolution = nn.Conv1d(6, 8, 3)
        self.register_buffer("x", torch.randn(5, 8))

    def forward(self):
        return USES[self.use](self, self.weight, self.x).tanh().square().sum()


USES = {
    "transposed": lambda m, w, x: x.mm(w) + (w.T @ x.T).T,
    "mT": lambda m, w, x: (w.mT @ x.T).T,
    "einsum": lambda m, w, x: torch.einsum("ni,ij->nj", x, w),
    "indexed": lambda m, w, x: x[:, :3] @ w[2:5] + w[7],
    "rows of both signs": lambda m, w, x: w[torch.tensor([[-1, 2], [-8, 2]])] + w[-2],
    "a row that is a tensor": lambda m, w, x: w[torch.tensor(3)] * w[5],
    "masked rows": lambda m, w, x: w[torch.arange(8) % 3 == 0],
    "a bool": lambda m, w, x: w[True],
    "gathered": lambda m, w, x: w[torch.tensor([1, 1, 6])],
    "weight norm": lambda m, w, x: x @ (w / w.norm(dim=1, keepdim=True)),
    "one plus": lambda m, w, x: x @ (1 + w),
    "stacked": lambda m, w, x: torch.stack([w, w * 2]).sum(0),
    "twice": lambda m, w, x: F.linear(F.linear(x, w.t()), w),
    "scaled addmm": lambda m, w, x: torch.addmm(torch.zeros(6), x, w, alpha=2.0),
    "baddbmm": lambda m, w, x: torch.baddbmm(torch.zeros(1, 5, 6), x[None], w[None]),
    "left operand": lambda m, w, x: F.linear(w, x[:, :6]),
    "4-D linear": lambda m, w, x: F.linear(x[:, :6].reshape(1, 5, 1, 6), w),
    "convolution": lambda m, w, x: m.convolution(w.T[None]),
    "clipped embedding": lambda m, w, x: F.embedding(torch.tensor([1, 6, 6]), w, scale_grad_by_freq=True),
}


@pytest.mark.parametrize("use", USES)
def test_any_operation_gives_the_dense_gradient(use):
    assert_chunks_match(Unusual(use), lambda m: m(), counts=(1, 3, 7))


class Experts(nn.Module):
    """A 3-D weight used in the ways that mixtures of experts use theirs, with an expert that nothing is
    routed to."""

    def __init__(self, use):
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.weight = nn.Parameter(torch.randn(5, 16, 8))
        self.register_buffer("x", torch.randn(12, 8))
        self.register_buffer("offsets", torch.tensor([3, 3, 7, 8, 12], dtype=torch.int32))

    def forward(self):
        return EXPERTS[self.use](self.weight, self.x, self.offsets).tanh().square().sum()


EXPERTS = {
    "grouped": lambda w, x, o: F.grouped_mm(x, w.transpose(-2, -1), offs=o),
    "grouped, not transposed": lambda w, x, o: F.grouped_mm(x.repeat(1, 2), w, offs=o),
    "grouped twice": lambda w, x, o: F.grouped_mm(F.grouped_mm(x, w.transpose(1, 2), offs=o), w, offs=o),
    "batched": lambda w, x, o: torch.bmm(x[:10].view(5, 2, 8).repeat(1, 1, 2), w),
    "matmul": lambda w, x, o: x[:10].view(5, 2, 8).repeat(1, 1, 2) @ w,
    "broadcast": lambda w, x, o: x.repeat(1, 2) @ w,
    "transposed otherwise": lambda w, x, o: w.transpose(0, 1)[2:4].sum(0) + w.transpose(1, 2).sum((0, 1))[:8],
    "one by one": lambda w, x, o: torch.cat([F.linear(x[i : i + 2], w[i]) for i in (0, 2, 3, 4, 0)]),
    "per token": lambda w, x, o: torch.bmm(w[torch.arange(12) % 4], x.unsqueeze(-1)),
}


@pytest.mark.parametrize("use", EXPERTS)
def test_experts_give_the_dense_gradient(use):
    assert_chunks_match(Experts(use), lambda m: m(), counts=(1, 2, 3, 5))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_every_implementation_of_experts_gives_the_dense_gradient(family, implementation):
    model = tiny_model(family)
    model.set_experts_implementation(implementation)
    assert_chunks_match(model, own_loss, counts=(7, 16))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_only_the_active_experts_have_a_gradient_in_memory(implementation):
    peaks = {}
    for routed in (True, False):
        profiler = CpuProfiler()
        with profiler.step(), profiler.phase("load"):
            model = tiny_model(
                "mixtral", num_hidden_layers=1, num_local_experts=16, hidden_size=64, intermediate_size=256,
            )  # fmt: skip
            model.set_experts_implementation(implementation)
        stream = ParameterStream(model)
        index = stream.names.index("model.layers.0.mlp.experts.gate_up_proj")
        chunk = next(c for c in stream.partition(40) if {s.index for s in c.slices} == {index})
        numel = stream.infos[index].numel
        with pytest.MonkeyPatch.context() as patch, activate(model, chunk, stream):
            if not routed:  # what any other operation gets
                patch.setattr(cut, "_SLICED", {})
            with profiler.step(), profiler.phase("forward"):
                own_loss(model).backward()
        peaks[routed] = max(sample.allocated_bytes for sample in profiler.samples)
        assert chunk.num_parameters * 8 < numel
    assert peaks[False] - peaks[True] > 0.6 * 4 * numel


class Head(nn.Module):
    """A linear layer with a bias next to norms with and without one; inputs of 2 to 4 dimensions."""

    def __init__(self, shape):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.rms = nn.LayerNorm(6), nn.RMSNorm(6)
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 6, bias=False)
        self.register_buffer("x", torch.randn(shape))

    def forward(self):
        return self.rms(self.second(self.first(self.norm(self.x)).relu())).pow(3).sum()


@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6), (2, 2, 3, 6), (6,)])
def test_any_number_of_dimensions(shape):
    assert_chunks_match(Head(shape), lambda m: m(), counts=(1, 2, 3, 4, 9, 18))


def description(model):
    return [
        (name, id(p), type(p), p.requires_grad, p.grad) for name, p in model.named_parameters(remove_duplicate=False)
    ] + [(key, value.data_ptr()) for key, value in model.state_dict().items()]


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_the_model_is_given_back_as_it_was(family):
    model = tiny_model(family)
    next(model.parameters()).requires_grad_(False)
    before = description(model)
    for chunk in ParameterStream(model).partition(7):
        with activate(model, chunk):
            keys = list(model.state_dict())
            assert keys == [entry[0] for entry in before[-len(keys) :]]
            assert model.get_input_embeddings().weight is next(model.parameters())
            own_loss(model).backward()
        assert description(model) == before


def test_the_model_is_given_back_after_an_exception():
    model = tiny_model("llama-tied")
    before = description(model)

    def interrupted():
        with activate(model, ParameterStream(model).partition(7)[0]):
            own_loss(model).backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert description(model) == before
    assert_chunks_match(model, own_loss, counts=(5,))


def test_a_parameter_subclass_comes_back_as_itself():
    class Special(nn.Parameter):
        pass

    model = nn.Linear(4, 6)
    model.weight.__class__ = Special
    with activate(model, ParameterStream(model).partition(2)[0]):
        assert isinstance(model.weight, nn.Parameter)
    assert type(model.weight) is Special


def test_two_chunks_cannot_be_active_at_once_and_the_first_survives_the_attempt():
    model = tiny_model("llama")
    stream = ParameterStream(model)
    dense = dense_gradients(model, own_loss)
    for first, second in ((3, 4), (1, 0)):
        with activate(model, stream.partition(5)[first]) as active:
            with pytest.raises(RuntimeError, match="another chunk of this model is active"):
                activate(model, stream.partition(5)[second]).__enter__()
            own_loss(model).backward()
            for s in active:
                assert relative_error(s.tensor.grad, dense[s.name][s.start : s.stop]) <= 1e-6


def test_gradients_live_in_the_leaves_alone_and_add_up_until_released():
    model = tiny_model("llama-tied")
    own_loss(model).backward()
    stale = [p.grad for p in model.parameters()]
    before = [gradient.clone() for gradient in stale]
    dense = {name: gradient.flatten() for (name, _), gradient in zip(model.named_parameters(), before, strict=True)}
    with activate(model, ParameterStream(model).partition(3)[1]) as active:
        own_loss(model).backward()
        once = [s.tensor.grad.clone() for s in active]
        own_loss(model).backward()
        for s, single in zip(active, once, strict=True):
            assert relative_error(single, dense[s.name][s.start : s.stop]) <= 1e-6
            assert torch.equal(s.tensor.grad, single + single)
            assert s.parameter.grad is None
            s.tensor.grad = None  # as torch.optim's zero_grad does
        own_loss(model).backward()
        assert all(torch.equal(s.tensor.grad, single) for s, single in zip(active, once, strict=True))
    assert [p.grad for p in model.parameters()] == stale
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), before, strict=True))


def test_an_update_between_forward_and_backward_raises():
    model = tiny_model("llama")
    with activate(model, ParameterStream(model).partition(5)[2]) as active:
        loss = own_loss(model)
        with torch.no_grad():
            active[0].tensor.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_the_leaf_is_the_weight():
    model = tiny_model("llama")
    with activate(model, ParameterStream(model).partition(5)[2]) as active:
        for s in active:
            assert s.tensor.is_leaf
            assert s.tensor.is_contiguous()
            with torch.no_grad():
                s.tensor.fill_(0.5)
            assert (s.parameter.detach().flatten()[s.start : s.stop] == 0.5).all()


def test_evaluation_and_copies_work_while_a_chunk_is_active():
    model = tiny_model("llama-tied")
    with torch.no_grad():
        expected = own_loss(model)
        with activate(model, ParameterStream(model).partition(7)[0]):
            assert torch.equal(own_loss(model), expected)
    duplicate = copy.deepcopy(model)
    assert torch.equal(own_loss(duplicate).detach(), expected)
