"""Trainings that plans are compared with on the CPU: small models of many families, and what is varied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from chunkplan.engine.spec import TrainingSpec


def llama_like(model_type: str, **changes: Any) -> dict[str, Any]:
    base = {
        "vocab_size": 8003, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 5,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return {"model_type": model_type, **base, **changes}


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": llama_like("llama"),
    "llama-tied": llama_like("llama", tie_word_embeddings=True),
    "qwen2": llama_like("qwen2"),
    "qwen3": llama_like("qwen3", head_dim=32),
    "mistral": llama_like("mistral", sliding_window=64),
    "phi3": llama_like("phi3", num_key_value_heads=8),
    "gemma2": llama_like("gemma2", head_dim=32, sliding_window=64),
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 8003, "n_embd": 256, "n_layer": 5, "n_head": 8, "n_positions": 1024,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "opt": {
        "model_type": "opt", "vocab_size": 8003, "hidden_size": 256, "ffn_dim": 1024, "num_hidden_layers": 5,
        "num_attention_heads": 8, "max_position_embeddings": 1024, "word_embed_proj_dim": 256,
    },
    "gpt_neox": {
        "model_type": "gpt_neox", "vocab_size": 8003, "hidden_size": 256, "intermediate_size": 1024,
        "num_hidden_layers": 5, "num_attention_heads": 8, "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "falcon": {
        "model_type": "falcon", "vocab_size": 8003, "hidden_size": 256, "num_hidden_layers": 5,
        "num_attention_heads": 8, "multi_query": True, "new_decoder_architecture": False,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "deepseek_v3": llama_like(
        "deepseek_v3", num_key_value_heads=8, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=32,
        qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=128, first_k_dense_replace=2, n_shared_experts=1,
    ),
    "mixtral": llama_like("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": llama_like(
        "qwen3_moe", head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128
    ),
    "bert": {
        "model_type": "bert", "vocab_size": 8003, "hidden_size": 256, "intermediate_size": 1024,
        "num_hidden_layers": 5, "num_attention_heads": 8, "max_position_embeddings": 1024,
    },
    "mamba": {
        "model_type": "mamba", "vocab_size": 2003, "hidden_size": 128, "state_size": 16, "num_hidden_layers": 4,
    },
    "t5": {
        "model_type": "t5", "vocab_size": 8003, "d_model": 256, "d_kv": 32, "d_ff": 688, "num_layers": 3,
        "num_heads": 8, "decoder_start_token_id": 0,
    },
    "bart": {
        "model_type": "bart", "vocab_size": 8003, "d_model": 256, "encoder_layers": 3, "decoder_layers": 3,
        "encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024,
        "max_position_embeddings": 1024,
    },
}  # fmt: skip

FAMILIES = tuple(CONFIGS)


@dataclass(frozen=True)
class Case:
    """One run: a model of CONFIGS and a training spec."""

    name: str
    model: str
    training: TrainingSpec


def case(model: str, num_chunks: int = 6, switch_every: int = 1, states: str = "keep", **training: Any) -> Case:
    """A case with the grid's defaults: fp32, 2 sequences of 128 tokens, full checkpointing, fused loss."""
    asked = {"seq_len": 128, "micro_batch_size": 2, "precision": "fp32", **training}
    kept = {key: asked.pop(key) for key in ("state_dtype", "master", "expansion") if key in asked}
    if model == "gemma2":
        asked["attention"] = "eager"
    schedule = {"num_chunks": num_chunks, "switch_every": switch_every, "states": states, **kept}
    changes = {"num_chunks": num_chunks, "switch_every": switch_every, "states": states, **training}
    name = " ".join([model, *(f"{key}={value}" for key, value in changes.items())])
    return Case(name, model, TrainingSpec.model_validate({**asked, "schedule": schedule}).resolved())


def grid() -> Iterator[Case]:
    """All cases: every family in both precisions with and without checkpointing, then one knob after the
    other.
    """
    for model in FAMILIES:
        for precision in ("fp32", "bf16"):
            for checkpointing in ("full", "none"):
                yield case(model, precision=precision, activation_checkpointing=checkpointing)
    for precision in ("fp32", "bf16"):
        for num_chunks in (1, 2, 17):
            yield case("llama", num_chunks=num_chunks, precision=precision)
            yield case("llama-tied", num_chunks=num_chunks, precision=precision, activation_checkpointing="none")
        for model in ("llama", "llama-tied", "gpt2"):
            yield case(model, precision=precision, loss="standard")
        for batch, length in ((1, 32), (8, 32), (8, 128), (1, 512), (1, 1024)):
            yield case("llama", precision=precision, micro_batch_size=batch, seq_len=length)
        for count in (2, 3):
            yield case("qwen2", precision=precision, gradient_accumulation_steps=count)
            yield case(
                "llama-tied", precision=precision, gradient_accumulation_steps=count, activation_checkpointing="none"
            )
        yield case("llama", precision=precision, attention="eager")
        yield case("llama", precision=precision, activation_checkpointing={"layers": [0, 3]})
        yield case("llama", precision=precision, max_grad_norm=None)
        yield from _packed(precision)
    yield from lora_grid()
    yield from _half_precisions()
    yield from _update_grid()
    yield from _long_sequences()


def _long_sequences() -> Iterator[Case]:
    """Up to 2048 tokens: where attention's scratch and the loss outgrow the weights."""
    for model in ("llama", "qwen2", "mistral"):
        for checkpointing in ("full", "none"):
            yield case(
                model, num_chunks=3, seq_len=2048, micro_batch_size=1, activation_checkpointing=checkpointing,
                precision="bf16" if model == "qwen2" else "fp32",
            )  # fmt: skip
    for model, length in (("gpt_neox", 2048), ("gpt2", 1024), ("opt", 1024), ("llama-tied", 2048)):
        yield case(model, num_chunks=3, seq_len=length, micro_batch_size=1, loss="standard")
        yield case(model, num_chunks=2, seq_len=length, micro_batch_size=1, precision="bf16")
    yield case("llama", num_chunks=3, seq_len=512, micro_batch_size=4, activation_checkpointing="none")
    yield case("llama", num_chunks=3, seq_len=256, micro_batch_size=8, activation_checkpointing="none")
    yield case("llama", num_chunks=3, seq_len=2048, micro_batch_size=1, attention="eager")
    yield case("bert", num_chunks=3, seq_len=1024, micro_batch_size=1)
    yield case("mixtral", num_chunks=3, seq_len=512, micro_batch_size=4)
    yield case("t5", num_chunks=3, seq_len=512, micro_batch_size=4)


def _update_grid() -> Iterator[Case]:
    """Optimizers, their states, masters, updates in backward, visits of several updates."""
    for optimizer in ("adamw8bit", "adafactor", "lion", "adagrad"):
        yield case("llama", optimizer=optimizer, num_chunks=3)
        yield case("llama-tied", optimizer=optimizer, precision="bf16", switch_every=2)
    for master in ("residual", "fp32"):
        yield case("llama", precision="bf16", master=master, state_dtype="int8", num_chunks=2)
    for model in ("llama", "llama-tied", "gpt2"):
        within: dict[str, Any] = {"update_in_backward": True, "max_grad_norm": None}
        yield case(model, num_chunks=1, **within)
        yield case(model, precision="bf16", num_chunks=4, switch_every=2, **within)
        yield case(model, expansion="factored", num_chunks=4, gradient_accumulation_steps=2)
    for states in ("keep", "reset"):
        for switch_every in (2, 3):
            yield case("llama", switch_every=switch_every, states=states)


def _half_precisions() -> Iterator[Case]:
    for loss in ("fused", "standard"):
        yield case("llama", precision="fp16", loss=loss)
        for autocast in ("bf16", "fp16"):
            for model in ("llama", "gpt2", "mixtral", "bert"):
                yield case(model, autocast=autocast, loss=loss)
                yield case(model, autocast=autocast, loss=loss, activation_checkpointing="none")


def _packed(precision: str) -> Iterator[Case]:
    for model in ("llama", "mistral", "gemma2", "gpt2", "gpt_neox"):
        for checkpointing in ("full", "none"):
            yield case(model, precision=precision, packing=True, activation_checkpointing=checkpointing)
    yield case("llama", precision=precision, packing=True, attention="eager", loss="standard")
    yield case("llama-tied", precision=precision, packing=True, gradient_accumulation_steps=2, seq_len=512)


def lora_grid() -> Iterator[Case]:
    """Adapters: every family in both precisions, then ranks, targets, dropout, accumulation."""
    for model in (name for name in FAMILIES if "moe" not in name and name not in ("mixtral", "mamba")):  # refused
        yield case(model, num_chunks=1, method="lora")
        yield case(model, num_chunks=1, method="lora", precision="bf16")
    for precision in ("fp32", "bf16"):
        yield case("llama", num_chunks=1, method="lora", precision=precision, activation_checkpointing="none")
        yield case("llama", num_chunks=1, method="lora", precision=precision, lora={"rank": 64, "dropout": 0.1})
        yield case("llama", num_chunks=1, method="lora", precision=precision, lora={"target_modules": ["q_proj"]})
        yield case("llama-tied", num_chunks=1, method="lora", precision=precision, gradient_accumulation_steps=2)
