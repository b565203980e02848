"""Backpropagation stops below the active chunk: in what is recomputed, in what is saved, and in bytes."""

import weakref
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from chunkplan.engine import ChunkFT, InputError, ParameterStream, activate
from chunkplan.engine.model.parts import decoder_layers
from chunkplan.engine.record.profiler import CpuProfiler
from chunkplan.engine.spec import CheckpointedLayers
from chunkplan.engine.training.step import Unobserved, compute_loss, forward_backward, prepared
from tests.support.families import tiny_batch, tiny_model
from tests.support.memory import held
from tests.support.steps import step_options

NUM_LAYERS = 6
HEADS = ("model.norm", "lm_head", "transformer.ln_f")


def lowest_layer(model, names):
    """The lowest layer that backpropagation of these parameters reaches; the number of layers when none."""
    layer_names = {module: name for name, module in model.named_modules()}
    prefixes = [layer_names[layer] + "." for layer in decoder_layers(model)]
    reached = [
        next((index for index, prefix in enumerate(prefixes) if name.startswith(prefix)), len(prefixes))
        if not name.startswith(HEADS)
        else len(prefixes)
        for name in names
    ]
    return 0 if any(is_embedding(name) for name in names) else min(reached)


def is_embedding(name):
    return "embed" in name or ".wte" in name or ".wpe" in name


@contextmanager
def counted_calls(model, part):
    """How often each layer's ``part`` really runs."""
    counts = Counter()
    hooks = [
        layer.get_submodule(part).register_forward_hook(lambda *_, i=i: counts.update([i]))
        for i, layer in enumerate(decoder_layers(model))
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def run(model, chunk, checkpointing, loss="fused"):
    batch, options = tiny_batch(), step_options(loss, checkpointing)
    with prepared(model, options), activate(model, chunk) as active:
        forward_backward(model, batch, 17.0, options, Unobserved())
        return [s.name for s in active]


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("llama", "input_layernorm"),
        ("llama-tied", "input_layernorm"),
        ("qwen2", "input_layernorm"),
        ("gpt2", "ln_1"),
    ],
)
@pytest.mark.parametrize("loss", ["fused", "standard"])
def test_exactly_the_layers_at_and_above_the_active_chunk_are_recomputed(family, part, loss):
    model = tiny_model(family, num_hidden_layers=NUM_LAYERS)
    seen = set()
    for chunk in ParameterStream(model).partition(12):
        with counted_calls(model, part) as counts:
            names = run(model, chunk, "full", loss)
        lowest = lowest_layer(model, names)
        recomputed = [index for index in range(NUM_LAYERS) if counts[index] == 2]
        assert recomputed == list(range(lowest, NUM_LAYERS)), names
        assert all(counts[index] == 1 for index in range(lowest))
        seen.add(lowest)
    assert {0, NUM_LAYERS - 1} <= seen


def test_only_chosen_layers_are_recomputed():
    model = tiny_model("llama", num_hidden_layers=NUM_LAYERS)
    bottom = ParameterStream(model).partition(12)[0]
    with counted_calls(model, "input_layernorm") as counts:
        run(model, bottom, CheckpointedLayers(layers=[1, 4, 4]))
    assert counts == {0: 1, 1: 2, 2: 1, 3: 1, 4: 2, 5: 1}
    with counted_calls(model, "input_layernorm") as counts:
        run(model, bottom, "none")
    assert set(counts.values()) == {1}
    assert not any("forward" in vars(layer) for layer in decoder_layers(model))


def test_a_layer_that_does_not_exist_is_refused_by_name():
    with pytest.raises(InputError) as refused:
        ChunkFT(tiny_model("llama"), 2, activation_checkpointing=CheckpointedLayers(layers=[2]))
    assert refused.value.field == "training.activation_checkpointing.layers"
    assert "has 2 layers" in refused.value.message


class Kept:
    """A tensor that autograd saved while the given part of the network ran."""

    def __init__(self, tensor, place):
        self.tensor, self.place = tensor, place


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_nothing_is_kept_below_the_active_chunk(family, checkpointing):
    model = tiny_model(family, num_hidden_layers=NUM_LAYERS)
    place, kept = -1, weakref.WeakSet()

    def enter(index):
        nonlocal place
        place = index

    def pack(tensor):
        item = Kept(tensor, place)
        kept.add(item)
        return item

    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_pre_hook(lambda *_, i=index: enter(i))
    batch, options = tiny_batch(), step_options("fused", checkpointing)
    lowest_seen = set()
    for chunk in ParameterStream(model).partition(12):
        enter(-1)
        with prepared(model, options), activate(model, chunk) as active:
            lowest = lowest_layer(model, [s.name for s in active])
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item.tensor):
                loss = compute_loss(model, batch, 17.0, options)
                # The last layer's place includes what follows it.
                places = {item.place for item in kept}
                loss.backward()
        del loss
        # The fused loss keeps finished gradients only: under a chunk of the head nothing else is there.
        assert places or lowest == NUM_LAYERS, "something must be kept for backward"
        assert min(places, default=lowest) >= min(lowest, NUM_LAYERS - 1) or is_embedding(active[0].name)
        assert not kept
        lowest_seen.add(lowest)
    assert NUM_LAYERS - 1 in lowest_seen


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_top_chunk_peaks_below_the_bottom_chunk(checkpointing):
    profiler = CpuProfiler()
    with profiler.step(), profiler.phase("load"):
        model = tiny_model("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=8, vocab_size=400)
    batch = tiny_batch(num_rows=8, num_tokens=64)
    peaks = {}
    with ChunkFT(model, num_chunks=16, activation_checkpointing=checkpointing, observer=profiler) as tuner:
        at_rest = held(profiler)
        for _ in range(16):
            index = tuner.visit.chunk_index
            with profiler.step():
                tuner.backward(batch)
                tuner.step()
            peaks[index] = max(sample.allocated_bytes for sample in profiler.samples)
    activations = {index: peak - at_rest for index, peak in peaks.items()}
    assert all(value > 0 for value in activations.values())
    assert activations[15] < activations[8] < activations[1]
    assert activations[15] < 0.75 * activations[0]


def test_checkpointing_lowers_the_peak_of_the_bottom_chunk():
    peaks = {}
    for checkpointing in ("none", "full"):
        profiler = CpuProfiler()
        model = tiny_model("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=8, vocab_size=400)
        at_rest = held(profiler)
        with (
            ChunkFT(model, 16, order="ascending", activation_checkpointing=checkpointing, observer=profiler) as tuner,
            profiler.step(),
        ):
            tuner.backward(tiny_batch(num_rows=8, num_tokens=64))
        peaks[checkpointing] = max(sample.allocated_bytes for sample in profiler.samples) - at_rest
    assert peaks["full"] < 0.5 * peaks["none"]


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_a_tied_embedding_needs_its_gradient_twice_and_no_third_time(num_chunks):
    profiler = CpuProfiler()
    model = tiny_model("llama-tied", hidden_size=32, vocab_size=50_000)
    embedding_bytes = model.get_input_embeddings().weight.nbytes
    with ChunkFT(model, num_chunks, order="ascending", observer=profiler) as tuner:
        at_rest = held(profiler)
        with profiler.step():
            tuner.backward(tiny_batch())
        highest = {sample.phase: sample.allocated_bytes - at_rest for sample in profiler.samples}
    # What the head and what the embedding gives; the first is where they are summed.
    assert 1.9 < highest["backward"] / (embedding_bytes / num_chunks) < 2.3
