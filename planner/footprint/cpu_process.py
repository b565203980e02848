"""What a trainer's process holds on the CPU, by what holds it: libraries, tokenizer, tensors, compiled
kernels.

The constants are those of a process as benchmarks.trainer_process measures it (one machine: x86-64 with
AVX-512, glibc 2.36, torch 2.13 for the CPU, transformers 5.23); what other libraries take besides is the
bound's business (chunkplan.planner.calibration.margins). Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chunkplan.engine.spec import Precision, TrainingSpec
from chunkplan.planner.catalog.overheads import MIB
from chunkplan.planner.trace.structure import ModelStructure

HOST_DATA_BYTES = 54 * MIB
"""Data set, profiler, and the code of its libraries that a run on the CPU has touched once it has stepped.
Fitted to half A of benchmarks.trainer_process, like the next four."""
ONEDNN_CODE_BYTES = 19 * MIB
"""What oneDNN's kernels for bf16 products add to it; those in fp16 were not compiled on the machine of the
fit."""
PACKING_BYTES = 11 * MIB
"""What packed batches add, besides their tensors."""
TOKENIZER_ENTRY_BYTES = 630
"""Per entry of the vocabulary, of byte-level BPE tokenizers as large as the model's vocabulary."""
SCAN_BYTES = 16 * MIB
"""What a run of a state-space model adds on the CPU, where its scan goes token by token, besides its tensors;
and by what share of these it grows: thousands of small ones that stay keep holes from joining. Measured: four
runs of a Mamba, of which one is in half A."""
SCAN_SHARE = 1 / 8
LOADING_BYTES = 20 * MIB
"""What the process holds besides the runtime and the tokenizer while it loads the weights."""
PEFT_BYTES = 9 * MIB
"""Host memory that importing peft takes (without bitsandbytes), which only LoRA does. Measured: 8.8 MiB, peft
0.21."""
ONEDNN_KERNEL_BYTES = 700 * 1024
"""One kernel more, which oneDNN compiles for a shape of a 16-bit product and keeps. Measured: 0.66 MB,
AVX-512."""
_PRODUCTS_PER_EXPERT = 6
"""Two matrices, each in forward, for the gradient of its input and for its own."""
_ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def cpu_process_bytes(
    runtime_bytes: int,
    training: TrainingSpec,
    config: Mapping[str, Any],
    structure: ModelStructure,
    allocated_bytes: int,
    kept_bytes: int,
) -> int:
    """Highest resident set of a run on the CPU: while it loads, or in a step.

    Loading holds the file's pages and the engine's own copy of the weights; where the file has another type,
    weights are converted on the way. A config that does not name the file's type is taken to be of a file in
    fp32. In a step, tensors take what they hold (chunkplan.engine.process.steady_heap). Writing the trained
    model takes no copy of it (safetensors 0.5).
    """
    base = runtime_bytes + TOKENIZER_ENTRY_BYTES * _text_value(config, "vocab_size", 0)
    own = [(info.numel, info.num_bytes) for info in structure.parameters]
    loaded = own if training.lora is None else structure.frozen  # adapters are made later
    file_type = _text_value(config, "dtype", None) or _text_value(config, "torch_dtype", None)
    file_bytes = sum(numel for numel, _ in loaded) * _ITEMSIZES.get(file_type, 4)
    loading = LOADING_BYTES + file_bytes + sum(size_bytes for _, size_bytes in loaded)
    stepping = HOST_DATA_BYTES + allocated_bytes + kept_bytes
    if training.compute_precision is Precision.BF16:
        stepping += ONEDNN_CODE_BYTES
    if training.packing:
        stepping += PACKING_BYTES
    if any("state_size" in key or "d_state" in key for key in config):
        stepping += SCAN_BYTES + int(SCAN_SHARE * (allocated_bytes - sum(size_bytes for _, size_bytes in own)))
    if training.lora is not None:
        stepping += PEFT_BYTES
    return base + max(loading, stepping)


def _text_value(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value of a config, or of its part for the language model."""
    inner = config.get("text_config") or {}
    return config.get(key) or inner.get(key) or default


def compiled_kernels_bytes(training: TrainingSpec, config: Mapping[str, Any]) -> int:
    """By how much a process on the CPU may grow during a run: an expert may get any number of a micro-batch's
    tokens, and every number is another shape. 0 without experts, and with fp32 products, for which nothing is
    compiled.
    """
    has_experts = any("expert" in key and isinstance(value, int) and value > 1 for key, value in config.items())
    if not has_experts or training.compute_precision is Precision.FP32:
        return 0
    return training.seq_len * training.micro_batch_size * _PRODUCTS_PER_EXPERT * ONEDNN_KERNEL_BYTES
