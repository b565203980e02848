"""Requests that cannot be planned are refused with the field's name, fast."""

import time

import pytest

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import parse
from chunkplan.planner import PlanRequest, plan

LLAMA = {
    "model_type": "llama",
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 211, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
MAMBA = {"model_type": "mamba", "vocab_size": 211, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
OPT = {
    **LLAMA, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32,
}  # fmt: skip


def ask(model=None, gpu="rtx-4090", **training):
    spec = {"seq_len": 16, "schedule": {"num_chunks": 2}, **training}
    return plan(parse(PlanRequest, {"model": model or {"config": LLAMA}, "gpu": gpu, "training": spec}))


REFUSED = [
    ("model", {"model": "llama-9-8b"}),
    ("gpu", {"gpu": "rtx-9999"}),
    ("gpu.link_bandwidth", {"gpu": {"name": "slow", "memory_bytes": 10**9, "link_bandwidth": 5e-324}}),
    ("gpu.bf16_flops", {"gpu": {"name": "fast", "memory_bytes": 10**9, "bf16_flops": float("inf")}}),
    ("gpu.context_bytes", {"gpu": {"name": "large", "memory_bytes": 10**9, "context_bytes": 10**30}}),
    ("model.config.num_hidden_layers", {"model": {"config": {**LLAMA, "num_hidden_layers": 10**6}}}),
    ("model.config.num_hidden_layers", {"model": {"config": {**LLAMA, "num_hidden_layers": 0}}}),
    ("model.config.hidden_size", {"model": {"config": {**LLAMA, "hidden_size": 10**12}}}),
    ("model.config.hidden_size", {"model": {"config": {**LLAMA, "num_attention_heads": 5}}}),
    ("model.config.model_type", {"model": {"config": {**LLAMA, "model_type": "nope"}}}),
    ("model.config.model_type", {"model": {"config": {"model_type": "vit"}}}),
    ("model.config", {"model": {"config": {**LLAMA, "hidden_act": "nope"}}}),
    ("model.config", {"model": {"config": {**LLAMA, "pad_token_id": 500}}}),
    ("model.config", {"model": {"config": {**LLAMA, "head_dim": 7}}}),
    (
        "training.attention",
        {"model": {"config": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}}},
    ),
    ("training.optimizer", {"optimizer": "nope"}),
    ("training.seq_len", {"model": {"config": GPT2}, "seq_len": 129}),
    ("training.seq_len", {"model": {"config": OPT}, "seq_len": 2048}),
    ("training.packing", {"model": {"config": OPT}, "packing": True}),
    ("training.seq_len", {"seq_len": 10**7}),
    ("training.seq_len", {"model": {"config": MAMBA}, "seq_len": 129}),
    ("model.config.model_type", {"model": {"config": {"model_type": "fsmt"}}}),
    ("training.autocast", {"autocast": "fp8"}),
    ("training.autocast", {"precision": "bf16", "autocast": "bf16"}),
    ("training.schedule.master", {"precision": "fp16", "schedule": {"num_chunks": 2, "master": "residual"}}),
    ("training.micro_batch_size", {"seq_len": 1024, "micro_batch_size": 10**6}),
    ("training.schedule.num_chunks", {"schedule": {"num_chunks": 0}}),
    ("training.schedule.num_chunks", {"schedule": {"num_chunks": 4000}}),
    ("training.schedule.num_chunks", {"schedule": {"num_chunks": 10**6}}),
    ("training.activation_checkpointing.layers", {"activation_checkpointing": {"layers": [2]}}),
]


@pytest.fixture(scope="module", autouse=True)
def libraries_are_loaded():
    """Importing torch is not part of a refusal."""
    ask()


@pytest.mark.parametrize(("field", "request_"), REFUSED)
def test_refusal_names_the_field(field, request_):
    begin = time.process_time()
    with pytest.raises(InputError) as refusal:
        ask(**request_)
    assert refusal.value.field == field
    assert refusal.value.message
    assert "\n" not in refusal.value.message
    assert time.process_time() - begin < 0.5


@pytest.mark.parametrize("length", [1, 2, 128])
def test_learned_positions_are_planned_up_to_their_end(length):
    assert ask({"config": GPT2}, seq_len=length).fits
    assert ask({"config": OPT}, seq_len=length).fits


def test_a_model_without_attention_is_planned():
    assert ask({"config": MAMBA}, seq_len=8).fits


def test_vocabulary_of_one_and_encoder_shapes_are_planned():
    assert ask({"config": {**LLAMA, "vocab_size": 1}}).fits
    assert ask({"config": {**LLAMA, "model_type": "bert"}}, loss="standard").fits
