"""Loading transformers models from local files, and finding their parts without a list of families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from chunkplan.engine.errors import InputError
from chunkplan.engine.model.tasks import task_of_config
from chunkplan.engine.spec import Precision

DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16, Precision.FP32: torch.float32}


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
            model: PreTrainedModel = task_of_config(parsed).auto_class.from_config(
                parsed, dtype=DTYPES[precision], attn_implementation=attention_for(parsed, attention)
            )
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


def attention_for(config: Any, asked: str) -> str:
    """The implementation to ask for: a model without attention has only the plain one."""
    return asked if hasattr(config, "num_attention_heads") else "eager"


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

    Raises:
        InputError: the weights lack a part of the model, which would start at random.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model: PreTrainedModel
    model, loading = task_of_config(config).auto_class.from_pretrained(
        folder,
        dtype=DTYPES[precision],
        attn_implementation=attention_for(config, attention),
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise InputError("model", f"its weights lack {missing[0]} ({len(missing)} missing) of {type(model).__name__}")
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
