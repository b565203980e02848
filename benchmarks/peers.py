"""What other estimators say of a dense fine-tuning run: accelerate, canifinetune, ftuneai, and the raw
formula.

All are asked for the same model (from its config, offline), batch, length and checkpointing. ``pip install
canifinetune ftuneai accelerate`` brings them (pure Python; none needs CUDA). A peer that cannot do a case
says why.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from chunkplan.engine.spec import Precision, TrainingSpec

GIB = 2**30
Answer = int | str
"""Bytes, or why there are none."""


def raw_formula(config: dict[str, Any], num_parameters: int, training: TrainingSpec) -> Answer:
    """16 bytes per parameter: weights, gradients, and AdamW's moments and master, without activations."""
    return 16 * num_parameters if training.method == "full" else "knows dense training only"


def accelerate(config: dict[str, Any], num_parameters: int, training: TrainingSpec) -> Answer:
    """``accelerate estimate-memory``: the largest of its stages, for the model's own size."""
    if not _has("accelerate"):
        return "not installed"
    from accelerate.commands.estimate import estimate_training_usage

    if training.method != "full":
        return "knows dense training only"
    dtype = {Precision.FP32: "float32", Precision.FP16: "float16", Precision.BF16: "bfloat16"}[training.precision]
    return int(max(estimate_training_usage(4 * num_parameters, dtype).values()))


def canifinetune(config: dict[str, Any], num_parameters: int, training: TrainingSpec) -> Answer:
    """Canifinetune's total without its safety margin; its target is reserved memory."""
    if not _has("canifinetune", "platformdirs"):
        return "not installed"
    from canifinetune.estimator import EstimateRequest, estimate, register_known_model

    if training.method == "chunkft":
        return "knows no chunk schedules"
    optimizer = {"adamw": "adamw_torch_fused", "adamw8bit": "adamw_8bit", "sgd": "sgd"}.get(training.optimizer.value)
    if optimizer is None:
        return f"knows no {training.optimizer.value}"
    try:
        register_known_model("benchmark", {**_shape(config), "total_params": num_parameters})
        answer = estimate(
            EstimateRequest(
                model_id="benchmark",
                method=training.method,
                seq_len=training.seq_len,
                micro_batch_size=training.micro_batch_size,
                base_dtype=training.precision.value,
                lora_rank=training.lora.rank if training.lora else 16,
                optimizer=optimizer,
                gradient_checkpointing=training.activation_checkpointing == "full",
                attention_implementation=training.attention,
                loss_backend="liger" if training.loss == "fused" else "stock",
                gpu_vram_gb=80.0,
                use_network=False,
            )
        ).memory
    except (KeyError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return int((answer.total_estimated_gb - answer.safety_margin_gb) * GIB)


def ftuneai(config: dict[str, Any], num_parameters: int, training: TrainingSpec) -> Answer:
    """Ftuneai's total."""
    if not _has("ftuneai"):
        return "not installed"
    from ftuneai import ModelSpec, TrainingConfig
    from ftuneai.core.memory import MemoryEstimator

    if training.method == "chunkft":
        return "knows no chunk schedules"
    optimizer = {"adamw": "adamw", "adamw8bit": "adam_8bit", "sgd": "sgd"}.get(training.optimizer.value)
    if optimizer is None:
        return f"knows no {training.optimizer.value}"
    try:
        shape = _shape(config)
        spec = ModelSpec(
            name="benchmark",
            parameters=num_parameters,
            hidden_size=shape["hidden_size"],
            num_layers=shape["num_hidden_layers"],
            num_attention_heads=shape["num_attention_heads"],
            num_kv_heads=shape["num_key_value_heads"],
            intermediate_size=shape["intermediate_size"],
            vocab_size=shape["vocab_size"],
            max_seq_length=training.seq_len,
        )
        asked = TrainingConfig(
            model="benchmark",
            method=training.method,
            batch_size=training.micro_batch_size,
            seq_length=training.seq_len,
            gradient_checkpointing=training.activation_checkpointing == "full",
            optimizer=optimizer,
            flash_attention=training.attention == "sdpa",
        )
        _as_enums(asked)
        total = MemoryEstimator(spec, asked).estimate().total_gb
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return int(total * GIB)


def _has(*packages: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in packages)


def _as_enums(asked: Any) -> None:
    """Ftuneai's estimator compares enums; its own front end makes them of strings in the same way."""
    from ftuneai import FineTuneMethod, OptimizerType

    asked.method, asked.optimizer = FineTuneMethod(asked.method), OptimizerType(asked.optimizer)


def _shape(config: dict[str, Any]) -> dict[str, Any]:
    """The sizes that the peers ask for; raises KeyError for families that name them otherwise."""
    hidden = config.get("hidden_size") or config.get("n_embd") or config["d_model"]
    layers = config.get("num_hidden_layers") or config.get("n_layer") or config["num_layers"]
    heads = config.get("num_attention_heads") or config.get("n_head") or config["num_heads"]
    width = config.get("intermediate_size") or config.get("ffn_dim") or config.get("n_inner") or 4 * hidden
    return {
        "family": config["model_type"], "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "intermediate_size": width, "vocab_size": config["vocab_size"],
        "tie_word_embeddings": config.get("tie_word_embeddings", config["model_type"] in ("gpt2", "opt")),
    }  # fmt: skip


PEERS: dict[str, Callable[[dict[str, Any], int, TrainingSpec], Answer]] = {
    "accelerate": accelerate,
    "canifinetune": canifinetune,
    "ftuneai": ftuneai,
    "16 bytes": raw_formula,
}


def peers_say(config: dict[str, Any], num_parameters: int, training: TrainingSpec) -> dict[str, Answer]:
    """Every peer's answer of one case."""
    return {name: ask(config, num_parameters, training) for name, ask in PEERS.items()}
