"""Which kernels a device runs where tensors without storage would take another path, and the scratch they allocate. Imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers.masking_utils
from torch import Tensor
from torch.nn import functional as F

_aten = torch.ops.aten


def _attention_cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype)
    out = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)
    result: Tensor = out[0]
    return result


def _attention_cuda(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    if query.dtype == torch.float32 or mask is not None:
        key, value = _expand_heads(query, key), _expand_heads(query, value)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype)
        out = _aten._scaled_dot_product_efficient_attention(query, key, value, mask, True, 0.0, is_causal, scale=scale)
    else:
        out = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)
    result: Tensor = out[0]
    return result


def _expand_heads(query: Tensor, grouped: Tensor) -> Tensor:
    repeats = query.shape[1] // grouped.shape[1]
    return grouped if repeats == 1 else grouped.repeat_interleave(repeats, dim=1)


@contextmanager
def traced_attention(device_kind: str) -> Iterator[None]:
    """Send scaled-dot-product attention to the kernel that the device would pick.

    Also answers transformers' question whether position ids describe packed sequences, which reads values, with no: the engine passes none.
    """
    kernel = _attention_cpu if device_kind == "cpu" else _attention_cuda

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        return kernel(query, key, value, attn_mask, is_causal, scale)

    original, packed = F.scaled_dot_product_attention, transformers.masking_utils.find_packed_sequence_indices
    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    transformers.masking_utils.find_packed_sequence_indices = lambda *args, **kwargs: None
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
        transformers.masking_utils.find_packed_sequence_indices = packed


def kernel_scratch_bytes(func: Any, args: Any, device_kind: str) -> int:
    """Bytes that a kernel takes from the allocator and gives back before it returns; 0 for nearly all."""
    packet = func.overloadpacket
    if device_kind == "cpu":
        if packet is _aten._scaled_dot_product_flash_attention_for_cpu_backward:
            # The kernel makes the incoming gradient contiguous.
            upstream: Tensor = args[0]
            return 0 if upstream.is_contiguous() else upstream.numel() * upstream.element_size()
        return 0
    if packet is _aten._scaled_dot_product_flash_attention_backward:
        # FlashAttention-2 accumulates dQ in fp32.
        query: Tensor = args[1]
        return query.numel() * 4
    return 0
