"""Loading transformers models from local files, and finding their parts without a list of families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from engine.errors import InputError
from engine.spec import Precision

DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16, Precision.FP32: torch.float32}


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of the network: the module list with the most parameters; empty when there is none."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    largest = max(lists, key=lambda item: sum(p.numel() for p in item.parameters()), default=None)
    return list(largest) if largest is not None else []


def backbone(model: nn.Module) -> nn.Module:
    """The network below the head, whose output has ``last_hidden_state``."""
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    if base is None:
        raise InputError(
            "training.loss",
            f"'fused' needs a model with a base network, {type(model).__name__} has none; use 'standard'",
        )
    return base


def head(model: nn.Module) -> nn.Linear:
    """The output projection onto the vocabulary."""
    find: Any = getattr(model, "get_output_embeddings", None)
    found = find() if find is not None else None
    if not isinstance(found, nn.Linear):
        raise InputError(
            "training.loss", f"'fused' needs a linear head, {type(model).__name__} has none; use 'standard'"
        )
    return found


def meta_model(config: dict[str, Any], precision: Precision, attention: str) -> PreTrainedModel:
    """The architecture of a Hugging Face config on the meta device: shapes without storage.

    Raises:
        InputError: transformers cannot build the config.
    """
    values = {
        key: value for key, value in config.items() if key not in ("torch_dtype", "dtype", "transformers_version")
    }
    try:
        parsed = AutoConfig.for_model(**values)
        parsed.use_cache = False
        with torch.device("meta"), torch.no_grad():
            model = AutoModelForCausalLM.from_config(parsed, dtype=DTYPES[precision], attn_implementation=attention)
    except ValueError as error:
        if "attention implementation" in str(error):
            raise InputError(
                "training.attention", f"this architecture does not support {attention!r}; use 'eager'"
            ) from error
        raise InputError("model.config", f"transformers cannot build it: {str(error).splitlines()[0]}") from error
    except (TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise InputError("model.config", f"transformers cannot build it: {str(error).splitlines()[0]}") from error
    model.train()
    return model


def check_model_folder(folder: str | Path) -> None:
    """Raises InputError when the folder does not hold a config, safetensors and a tokenizer."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError("model", f"no config.json in {folder}")
    if not any(folder.glob("*.safetensors")):
        raise InputError("model", f"no *.safetensors in {folder}; other weight formats are not read")
    if not (folder / "tokenizer_config.json").is_file():
        raise InputError("model", f"no tokenizer_config.json in {folder}")


def load_model(folder: str | Path, precision: Precision, attention: str, device: str) -> PreTrainedModel:
    """A local Hugging Face folder as a model in training mode, its weights in the device's own allocator.

    :func:`check_model_folder` says which folders can be loaded.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=DTYPES[precision],
        attn_implementation=attention,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    _own_storage(model, torch.device(device))
    model.config.use_cache = False
    model.train()
    return model


def _own_storage(model: nn.Module, device: torch.device) -> None:
    """Move every tensor to the device; on the CPU copy it, since loaded weights are maps of the file."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.clone() if device.type == "cpu" else tensor.data.to(device)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any valid token: padded positions are neither attended to nor counted."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def last_hidden_state(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Output of the backbone, [batch, sequence, hidden size]."""
    output = backbone(model)(input_ids=input_ids, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden
