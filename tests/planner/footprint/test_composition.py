"""Repeating distinct layers gives the step of the whole model, event by event."""

import pytest

from chunkplan.engine.spec import TrainingSpec, parse
from chunkplan.engine.stream.chunks import Chunk, Slice, partition
from chunkplan.planner import PlanRequest, plan
from chunkplan.planner.footprint import steps
from chunkplan.planner.footprint.by_category import NOTHING
from chunkplan.planner.footprint.compose import compose
from chunkplan.planner.footprint.folded import fold, segment_moments
from chunkplan.planner.trace import roles as trace_roles
from chunkplan.planner.trace import tracer
from chunkplan.planner.trace.layers import Copies, LayerRun, layer_runs
from chunkplan.planner.trace.roles import chunk_roles, stand_ins
from chunkplan.planner.trace.tracer import ModelTracer

BASE = {
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": {**BASE, "model_type": "llama"},
    "llama-tied": {**BASE, "model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {**BASE, "model_type": "qwen2"},
    "mistral": {**BASE, "model_type": "mistral", "sliding_window": 8},
    "phi3": {**BASE, "model_type": "phi3"},
    "gemma2": {**BASE, "model_type": "gemma2", "head_dim": 8, "sliding_window": 8},
    "gpt2": {"model_type": "gpt2", "vocab_size": 211, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 128},
    "opt": {**BASE, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": {**BASE, "model_type": "gpt_neox"},
    "smollm3": {**BASE, "model_type": "smollm3", "no_rope_layer_interval": 4},
}
SPECS = [
    ("cpu", {"loss": "fused", "precision": "bf16"}),
    ("cuda", {"loss": "standard", "activation_checkpointing": "none", "gradient_accumulation_steps": 2}),
    (
        "cuda",
        {"activation_checkpointing": {"layers": [0, 1, 4]}, "gradient_accumulation_steps": 3, "precision": "fp32"},
    ),
]


def tracer_of(family, changes, device, num_layers=6):
    attention = "eager" if family == "gemma2" else "sdpa"
    training = TrainingSpec.model_validate({"seq_len": 16, "micro_batch_size": 2, "attention": attention, **changes})
    layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": num_layers}
    return ModelTracer({**CONFIGS[family], **layers}, training, device)


def whole_model(tracer, structure, chunk, numels):
    """The step with every layer traced."""
    trace = tracer.trace_layers(chunk, list(range(structure.num_layers)))
    runs = [LayerRun(index, 1) for index in range(structure.num_layers)]
    return compose(trace, runs, numels, tracer.training.precision.itemsize), (trace, runs)


def stood_for(structure, chunk, runs):
    """Elements of the slices that a trace of the chunk's roles knows."""
    return [chunk.slices[ordinals[0]].numel for ordinals in stand_ins(structure, chunk, runs)]


def sizes(segments):
    return [(s.phase, s.place, [size_bytes for _, size_bytes, _ in s.events]) for s in segments]


def peak_bytes(trace, runs, numels, itemsize):
    """(highest moment, what is left) of a folded step: in totals, which by category say the same."""
    folded, copies = fold(trace, 512), Copies.of(runs)
    block_sizes = folded.sizes(copies, numels, itemsize)
    totals = list(segment_moments(folded.totals, copies, block_sizes, 0))
    sizes_by_category = folded.sizes_by_category(block_sizes)
    by_category = segment_moments(folded.by_category, copies, sizes_by_category, NOTHING)
    assert [(peak.total_bytes, net.total_bytes) for peak, net in by_category] == totals
    live, highest = 0, 0
    for peak, net in totals:
        highest = max(highest, live + peak)
        live += net
    return highest, live


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("device", "changes"), SPECS, ids=["full", "none", "chosen"])
def test_composed_step_equals_the_whole_model(family, device, changes):
    assert_composed_is_whole(family, device, changes)


@pytest.mark.parametrize(
    ("family", "device", "checkpointing"),
    [("llama", "cpu", "full"), ("mistral", "cuda", "none"), ("gemma2", "cuda", {"layers": [0, 1, 4]})],
    ids=["full", "none", "chosen"],
)
def test_a_mask_that_all_layers_share_is_composed_too(family, device, checkpointing):
    changes = {"packing": True, "seq_len": 64, "activation_checkpointing": checkpointing}
    assert_composed_is_whole(family, device, changes)


def assert_composed_is_whole(family, device, changes):
    tracer = tracer_of(family, changes, device)
    structure = tracer.structure()
    for num_chunks, index in ((1, 0), (7, 0), (7, 3), (7, 6)):
        chunk = partition(structure.parameters, num_chunks)[index]
        roles = chunk_roles(structure, chunk, tracer.training)
        runs = layer_runs(roles.layers)
        numels = stood_for(structure, chunk, runs)
        itemsize = tracer.training.precision.itemsize
        trace = tracer.trace(chunk, roles)
        all_numels = [piece.numel for piece in chunk.slices]
        whole, (whole_trace, whole_runs) = whole_model(tracer, structure, chunk, all_numels)
        assert sizes(compose(trace, runs, numels, itemsize)) == sizes(whole)
        assert peak_bytes(trace, runs, numels, itemsize) == peak_bytes(whole_trace, whole_runs, all_numels, itemsize)


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}], ids=["one", "accumulated"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_chunks_that_share_a_trace_get_their_own_sizes(family, changes):
    """A trace serves every chunk of the same roles, wherever the chunk cuts its tensors."""
    tracer = tracer_of(family, {**changes, "activation_checkpointing": "none"}, "cuda", num_layers=10)
    structure = tracer.structure()
    first_with, num_resized, most = {}, 0, 4
    for chunk in [*partition(structure.parameters, 20), *partition(structure.parameters, 23)]:
        roles = chunk_roles(structure, chunk, tracer.training)
        first = first_with.setdefault(roles.key, chunk)
        numels = [piece.numel for piece in chunk.slices]
        if numels == [piece.numel for piece in first.slices]:
            continue
        if num_resized == most:
            break
        num_resized += 1
        trace = tracer.trace(first, chunk_roles(structure, first, tracer.training))
        runs = layer_runs(roles.layers)
        composed = compose(trace, runs, stood_for(structure, chunk, runs), 2)
        assert sizes(composed) == sizes(whole_model(tracer, structure, chunk, numels)[0])
    assert num_resized == most


def chunk_of_layers(structure, layers):
    pieces = [
        Slice(index, 0, info.numel)
        for index, (info, layer) in enumerate(zip(structure.parameters, structure.layer_of, strict=True))
        if layer in layers
    ]
    return Chunk(0, tuple(pieces))


@pytest.mark.parametrize(
    "changes", [{}, {"update_in_backward": True, "max_grad_norm": None}], ids=["end", "in-backward"]
)
def test_a_trace_serves_chunks_of_more_and_of_fewer_layers(changes):
    tracer = tracer_of("llama", changes, "cuda", num_layers=12)
    structure = tracer.structure()
    long, short = chunk_of_layers(structure, range(1, 8)), chunk_of_layers(structure, range(1, 5))
    long_roles, roles = (chunk_roles(structure, chunk, tracer.training) for chunk in (long, short))
    assert long_roles.key == roles.key
    runs, trace = layer_runs(roles.layers), tracer.trace(long, long_roles)
    slices = stand_ins(structure, short, runs)
    composed = compose(trace, runs, stood_for(structure, short, runs), 2, slices)
    whole, _ = whole_model(tracer, structure, short, [piece.numel for piece in short.slices])
    assert gradients(composed) == gradients(whole)
    assert {ordinal for *_, ordinal in gradients(composed)} == set(range(len(short.slices)))


def gradients(segments):
    """Where the gradients of the chunk's slices come and go."""
    return [
        (segment.phase, segment.place, size_bytes, ordinal)
        for segment in segments
        for _, size_bytes, ordinal in segment.events
        if ordinal >= 0
    ]


def test_layers_of_two_kinds_are_not_mixed():
    tracer = tracer_of("gemma2", {"activation_checkpointing": "full"}, "cuda")
    structure = tracer.structure()
    sliding, full = structure.signatures[:2]
    assert sliding != full
    assert structure.signatures == (sliding, full) * 3


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": {"num_chunks": 2, "switch_every": 3}},
        {"schedule": {"num_chunks": 2}, "update_in_backward": True, "max_grad_norm": None},
    ],
    ids=["at-the-end", "in-backward"],
)
def test_reserved_bytes_are_those_of_the_whole_model(changes, monkeypatch, tmp_path):
    config = {**CONFIGS["llama"], "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 14}
    training = {"seq_len": 64, "micro_batch_size": 4, "optimizer": "adamw", **changes}
    request = parse(PlanRequest, {"model": {"config": config}, "gpu": "rtx-4090", "training": training})
    composed = plan(request).peak
    for module in (steps, tracer, trace_roles):
        monkeypatch.setattr(module, "layer_runs", lambda roles: [LayerRun(index, 1) for index in range(len(roles))])
    monkeypatch.setenv("CHUNKPLAN_CACHE_DIR", str(tmp_path))
    assert plan(request).peak == composed
