"""Loading transformers models from local files, and finding their parts without a list of families."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from chunkplan.engine.errors import InputError
from chunkplan.engine.model.tasks import task_of_config
from chunkplan.engine.spec import Precision

DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16, Precision.FP32: torch.float32}


def layer_lists(model: nn.Module) -> list[list[nn.Module]]:
    """The lists of repeated blocks, in the order of the model: one for most, an encoder's and a decoder's for
    some.

    A block is a module with parts, and a matrix in one of them; lists inside a block are its own business.
    """
    found: list[list[nn.Module]] = []
    inner: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inner:
            inner.update(module.modules())
            if len(module) and all(_is_block(item) for item in module):
                found.append(list(module))
    return found


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(p.dim() > 1 for p in module.parameters())


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """All repeated blocks of the network; indices of layers count these, an encoder's before a decoder's."""
    return [layer for layers in layer_lists(model) for layer in layers]


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


class _HeadReached(Exception):
    """Ends a forward pass at the output projection."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def head_input(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """What the model's forward gives to its output projection, [batch, sequence, hidden size]; logits are
    never built.

    Raises:
        InputError: the model has no linear head, or does not call it.
    """
    projection = head(model)
    replaced = vars(projection).get("forward")

    def stop(hidden: Tensor) -> Tensor:
        raise _HeadReached(hidden)

    projection.forward = stop  # type: ignore[method-assign, assignment]
    try:
        model(**inputs)
    except _HeadReached as reached:
        return reached.hidden
    finally:
        if replaced is None:
            del projection.forward
        else:
            projection.forward = replaced  # type: ignore[method-assign]
    raise InputError("training.loss", f"'fused' needs a head that {type(model).__name__} calls; use 'standard'")
