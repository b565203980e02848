"""Writing a model's adapters alone, as peft reads them."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import PreTrainedModel


def save_adapters(model: PreTrainedModel, folder: Path, base_model: str) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, for ``peft.PeftModel``.

    Args:
        model: with adapters.
        folder: exists.
        base_model: what the adapter names as its base: a Hugging Face name where there is one, never a path.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = {
        f"base_model.model.{name}": tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(model).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base_model, True
    config.target_modules = sorted(config.target_modules)  # a set's order changes from run to run
    config.save_pretrained(str(folder))
