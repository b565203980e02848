"""Which attention kernel torch takes on a GPU, and what each kernel takes beside its tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from chunkplan.engine.torch_internals import fused_attention_choice
from chunkplan.planner.spec import GpuSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MASKS = ("none", "bool", "additive", "additive with gradient")
HEADS = {
    "equal": (8, 8, False), "grouped by enable_gqa": (8, 2, True), "grouped, broadcast": (8, 2, False),
    "one key head, broadcast": (8, 1, False), "one key head by enable_gqa": (8, 1, True),
}  # fmt: skip
SIZES = ((32, 32), (40, 40), (64, 64), (68, 68), (70, 70), (80, 80), (96, 96), (128, 128), (192, 192), (192, 128),
         (256, 256), (264, 264), (320, 320), (512, 512))  # fmt: skip
SHAPES = (
    # batch, heads, key heads, tokens, head size, value head size
    (2, 32, 32, 2048, 128, 128), (2, 32, 8, 2048, 128, 128), (1, 8, 8, 1000, 64, 64), (4, 12, 12, 512, 64, 64),
    (2, 14, 2, 1024, 64, 64), (1, 32, 32, 1537, 96, 96), (2, 16, 16, 1024, 192, 128), (1, 16, 8, 2048, 256, 256),
)  # fmt: skip


def choices(device: torch.device, gpu: GpuSpec) -> dict[str, Any]:
    """The kernel's name by data type, heads, head sizes, mask, dropout and causality."""
    rows = []
    for dtype, heads, sizes, mask, dropout, is_causal in itertools.product(
        DTYPES, HEADS, SIZES, MASKS, (0.0, 0.1), (False, True)
    ):
        num_heads, num_key_heads, by_name = HEADS[heads]
        if (is_causal and mask != "none") or (sizes not in ((64, 64), (128, 128)) and heads != "equal"):
            continue
        query, key, value = _inputs(1, num_heads, num_key_heads, 128, *sizes, DTYPES[dtype], device)
        attn_mask = _mask(mask, 128, DTYPES[dtype], device)
        try:
            number = fused_attention_choice(query, key, value, attn_mask, dropout, is_causal, enable_gqa=by_name)
            name = "refused" if number < 0 else SDPBackend(number).name
        except RuntimeError as error:
            name = f"refused: {str(error).splitlines()[0][:80]}"
        rows.append([dtype, heads, *sizes, mask, dropout, is_causal, name])
    order = getattr(torch._C, "_get_sdp_priority_order", list)()
    return {
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "capability": torch.cuda.get_device_capability(device),
        "priority": [SDPBackend(number).name for number in order],
        "columns": ["dtype", "heads", "head_size", "value_size", "mask", "dropout", "is_causal", "kernel"],
        "rows": rows,
    }


def _inputs(
    batch: int, heads: int, key_heads: int, tokens: int, size: int, value_size: int, dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Laid out as models do: tokens before heads in memory."""
    shapes = ((heads, size), (key_heads, size), (key_heads, value_size))
    first, second, third = (
        torch.randn(batch, tokens, count, width, dtype=dtype, device=device).transpose(1, 2).requires_grad_()
        for count, width in shapes
    )
    return first, second, third


def _mask(kind: str, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "bool":
        return torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device).tril()
    return torch.zeros(1, 1, tokens, tokens, dtype=dtype, device=device, requires_grad=kind.endswith("gradient"))


def scratch(device: torch.device, gpu: GpuSpec) -> dict[str, Any]:
    """Bytes that each kernel keeps for backward, and takes for a moment, forward and backward."""
    rows = [row for shape in SHAPES for row in _scratch_of(shape, device)]
    columns = ["batch", "heads", "key_heads", "tokens", "head_size", "value_size", "dtype", "mask", "dropout",
               "kernel", "out", "kept", "forward_peak", "backward_peak", "gradients"]  # fmt: skip
    return {"columns": columns, "rows": rows}


def _scratch_of(shape: tuple[int, ...], device: torch.device) -> Iterator[list[Any]]:
    variants = [(dtype, "none", 0.0) for dtype in DTYPES]
    variants += [("bf16", "bool", 0.0), ("bf16", "additive", 0.0), ("fp32", "additive", 0.0), ("bf16", "none", 0.1)]
    for (dtype, mask, dropout), kernel in itertools.product(
        variants, ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH", "default")
    ):
        if kernel == "MATH" and (dtype != "bf16" or mask != "none"):
            continue
        try:
            found = _scratch(shape, dtype, mask, dropout, kernel, device)
        except RuntimeError as error:
            found = [str(error).splitlines()[0][:60]]
        yield [*shape, dtype, mask, dropout, kernel, *found]


def _scratch(
    shape: tuple[int, ...], dtype: str, mask: str, dropout: float, kernel: str, device: torch.device
) -> list[Any]:
    batch, heads, key_heads, tokens, size, value_size = shape
    query, key, value = _inputs(batch, heads, key_heads, tokens, size, value_size, DTYPES[dtype], device)
    attn_mask = _mask(mask, tokens, DTYPES[dtype], device)
    every = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    taken = every if kernel == "default" else [getattr(SDPBackend, kernel)]

    def forward() -> Tensor:
        result: Tensor = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout, is_causal=mask == "none", enable_gqa=heads != key_heads
        )
        return result

    if kernel == "default":  # what models get, without a context
        return _peaks(forward, (query, key, value), device)
    with sdpa_kernel(taken):
        return _peaks(forward, (query, key, value), device)


def _peaks(forward: Any, leaves: tuple[Tensor, ...], device: torch.device) -> list[Any]:
    def begin() -> int:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)

    def peak(before: int) -> int:
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    forward().sum().backward()  # libraries load
    for leaf in leaves:
        leaf.grad = None
    before = begin()
    out = forward()
    forward_peak, kept = peak(before), torch.cuda.memory_allocated(device) - before
    upstream = torch.ones_like(out)
    before = begin()
    out.backward(upstream)
    backward_peak = peak(before)
    gradients = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    return [out.nbytes, kept, forward_peak, backward_peak, gradients]
