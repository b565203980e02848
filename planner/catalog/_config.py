"""Checks of a model configuration, in milliseconds, before anything is built from it.

Names differ between families (``num_hidden_layers``, ``n_layer``): each fact has one list of its spellings
here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from chunkplan.engine.errors import InputError
from chunkplan.planner.catalog._data import did_you_mean, load

MAX_LAYERS = 2000
MAX_SIZE = 10_000_000
MAX_HEADS = 100_000
MAX_EXPERTS = 100_000
_MAX_DEPTH = 20
_MAX_VALUES = 200_000

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_HEAD_DIM = ("head_dim", "kv_channels", "d_kv", "qk_head_dim", "qk_nope_head_dim")
_FEED_FORWARD = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim")
_VOCABULARY = ("vocab_size",)
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")
_OTHER_SIZES = (
    "moe_intermediate_size",
    "embedding_size",
    "word_embed_proj_dim",
    "v_head_dim",
    "q_lora_rank",
    "kv_lora_rank",
)

_REFUSED = {
    "auto_map": "remote code is never run; remove this key to plan with transformers' own class for the model type",
    "trust_remote_code": "remote code is never run; remove this key",
    "quantization_config": "quantized weights cannot be fully fine-tuned; give the unquantized model's configuration",
}


def causal_lm_class(model_type: str) -> str:
    """Class name of the language model that transformers has for ``model_type``: causal where it has one."""
    return str(load("model_types.json")[model_type])


def check_config(config: dict[str, Any]) -> None:
    """Refuse a configuration that no real model has.

    Raises:
        InputError: on ``model.config.<key>``.
    """
    _check_model_type(config)
    for key, message in _REFUSED.items():
        if config.get(key):
            raise _error(key, message)
    _check_values(config)
    for prefix, part in _parts(config):
        _check_sizes(prefix, part)
        _check_heads(prefix, part)


def _error(key: str, message: str) -> InputError:
    return InputError(f"model.config.{key}", message)


def _check_model_type(config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise _error("model_type", "required: the architecture's name in transformers, such as 'llama'")
    known = load("model_types.json")
    if model_type not in known:
        shown = model_type if len(model_type) <= 60 else f"{model_type[:60]}…"
        hint = did_you_mean(model_type[:60], known)
        raise _error("model_type", f"{shown!r} is no language model of transformers that can be planned{hint}")


def _check_values(config: dict[str, Any]) -> None:
    """No NaN or infinity, no absurd nesting or length, anywhere."""
    for count, (path, value) in enumerate(_walk(config, "", 0)):
        if isinstance(value, float) and not math.isfinite(value):
            raise _error(path, f"must be a finite number (got {value})")
        if count >= _MAX_VALUES:
            raise InputError("model.config", f"holds more than {_MAX_VALUES} values")


def _walk(value: object, path: str, depth: int) -> Iterator[tuple[str, object]]:
    if depth > _MAX_DEPTH:
        raise InputError("model.config", f"is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(inner, f"{path}.{str(key)[:60]}" if path else str(key)[:60], depth + 1)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _walk(inner, f"{path}.{index}", depth + 1)
    else:
        yield path, value


def _parts(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The configuration and its nested model configurations (``text_config`` …), each with its key prefix."""
    yield prefix, config
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            yield from _parts(value, f"{prefix}{key}.")


def _check_sizes(prefix: str, part: dict[str, Any]) -> None:
    for keys, minimum, maximum in (
        (_LAYERS, 1, MAX_LAYERS),
        (_HEADS + _KV_HEADS, 1, MAX_HEADS),
        (_HIDDEN + _HEAD_DIM + _FEED_FORWARD + _VOCABULARY, 1, MAX_SIZE),
        (_EXPERTS, 0, MAX_EXPERTS),
        (_OTHER_SIZES, 0, MAX_SIZE),
        (_POSITIONS, 1, 10 * MAX_SIZE),
    ):
        for key in keys:
            for value in _numbers(part.get(key)):
                _check_integer(prefix + key, value, minimum, maximum)


def _numbers(value: object) -> list[object]:
    """A size may be one number, one per layer, or absent."""
    if isinstance(value, list):
        return [item for item in value if item is not None]
    return [] if value is None else [value]


def _check_integer(key: str, value: object, minimum: int, maximum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _error(key, f"must be an integer (got {_shown(value)})")
    if not minimum <= value <= maximum:
        raise _error(key, f"must be between {minimum} and {maximum} (got {_shown(value)})")


def _shown(value: object) -> str:
    """A value for an error message; Python refuses to print integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return str(value)[:40]


def _check_heads(prefix: str, part: dict[str, Any]) -> None:
    """Heads divide the hidden size (unless the head size is given) and key-value heads divide heads."""
    heads_key, heads = _first(part, _HEADS)
    hidden_key, hidden = _first(part, _HIDDEN)
    _, head_dim = _first(part, _HEAD_DIM)
    if heads and hidden and not head_dim and hidden % heads:
        raise _error(
            prefix + hidden_key, f"must be a multiple of {heads_key} ({heads}) unless head_dim is given (got {hidden})"
        )
    kv_key, kv_heads = _first(part, _KV_HEADS)
    if heads and kv_heads and heads % kv_heads:
        raise _error(prefix + kv_key, f"must divide {heads_key} ({heads}) (got {kv_heads})")


def _first(part: dict[str, Any], keys: tuple[str, ...]) -> tuple[str, int]:
    """The first of ``keys`` that holds one number, and that number; ("", 0) when none does."""
    return next(((key, part[key]) for key in keys if isinstance(part.get(key), int)), ("", 0))
