"""Which kernels a device runs where tensors without storage take another path, and their scratch. Imports
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, reduce
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from transformers import masking_utils

from chunkplan.engine.arithmetic import round_up
from chunkplan.engine.gradients.cut_parameter import CutParameter, CutTranspose
from chunkplan.engine.model.autocast import autocast_operands
from chunkplan.engine.torch_internals import fused_attention_choice, torch_grouped_product, without_modes
from chunkplan.planner.catalog import host_threads
from chunkplan.planner.catalog.overheads import (
    ONEDNN_SCRATCH_BYTES,
    ONEDNN_TRANSPOSED_BYTES,
    ONEDNN_TRANSPOSED_MAX_BYTES,
)

_aten = torch.ops.aten
RNG_STATE_BYTES = 5056
"""State of the CPU's random generator (torch.get_rng_state)."""


def _attention_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    facts = tuple((x.shape[1], x.shape[3], x.dtype, x.requires_grad) for x in (query, key, value))
    mask_facts = None if mask is None else (mask.dtype, mask.requires_grad)
    if not _takes_flash_on_cpu(facts, mask_facts, dropout, is_causal, enable_gqa):
        return _attention_math(query, key, value, mask, dropout, is_causal, scale, enable_gqa)
    out = _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    result: Tensor = out[0]
    return result


@cache
def _takes_flash_on_cpu(
    facts: tuple[tuple[int, int, torch.dtype, bool], ...],
    mask_facts: tuple[torch.dtype, bool] | None,
    dropout: float,
    is_causal: bool,
    enable_gqa: bool,
) -> bool:
    """Ask torch itself, on real tensors of one token, whether the CPU's flash kernel takes this attention.

    It takes neither dropout, nor a mask with a gradient, nor one key head that is broadcast over the queries'
    heads, nor values of another size than the keys: these go to the math form.

    Args:
        facts: of query, key and value: heads, head size, data type, whether it takes a gradient.
        mask_facts: data type of the mask, and whether it takes a gradient; None without a mask.
        dropout: share of the scores that are dropped.
        is_causal: whether later tokens are hidden.
        enable_gqa: whether fewer key heads than query heads are asked for by name.
    """
    with without_modes():  # nothing of this is a part of the step that is traced
        query, key, value = (
            torch.empty(1, heads, 1, size, dtype=dtype, device="cpu", requires_grad=takes_gradient)
            for heads, size, dtype, takes_gradient in facts
        )
        mask = None
        if mask_facts is not None:
            mask = torch.zeros(1, 1, 1, 1, dtype=mask_facts[0], device="cpu", requires_grad=mask_facts[1])
        choice = fused_attention_choice(query, key, value, mask, dropout, is_causal, enable_gqa=enable_gqa)
    return bool(choice == SDPBackend.FLASH_ATTENTION.value)


def _attention_math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Product, softmax, product, with all scores in memory: what torch falls back to, and Apple's GPUs train
    by.
    """
    out = _aten._scaled_dot_product_attention_math(
        query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    result: Tensor = out[0]
    return result


def _attention_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    if query.dtype == torch.float32 or mask is not None:
        key, value = _expand_heads(query, key), _expand_heads(query, value)
        out = _aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, True, dropout, is_causal, scale=scale
        )
    else:
        out = _aten._scaled_dot_product_flash_attention(query, key, value, dropout, is_causal, False, scale=scale)
    result: Tensor = out[0]
    return result


def _expand_heads(query: Tensor, grouped: Tensor) -> Tensor:
    repeats = query.shape[1] // grouped.shape[1]
    return grouped if repeats == 1 else grouped.repeat_interleave(repeats, dim=1)


def _dropout_cuda(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """The fused kernel that CUDA has: a mask of one byte per element."""
    if not training or p == 0.0:
        return input
    result: Tensor = _aten.native_dropout(input, p, True)[0]
    return result


def _rng_state() -> Tensor:
    return torch.empty(RNG_STATE_BYTES, dtype=torch.uint8, device="meta")


class _GroupedProduct(torch.autograd.Function):
    """Shapes and work of a product of each group of rows with its own matrix, all groups equally large.

    The meta kernel of torch knows bf16 only. What is kept and returned does not depend on how large the
    groups are.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.num_groups = weight.shape[0]
        with torch.autocast("cpu", enabled=False):  # which passes grouped products by
            return x.mm(weight[0])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (dy,) = upstream
        x, weight = ctx.saved_tensors
        dx = dy.mm(weight[0].t()) if weight is not None else None
        # The real kernel gives a transposed weight a transposed gradient; the size is the same.
        return dx, None if x is None else _products_of_groups(x.t(), dy, ctx.num_groups)


def _products_of_groups(left: Tensor, right: Tensor, num_groups: int) -> Tensor:
    """[groups, left's rows, right's columns]: the products of equally large groups of left's columns, right's
    rows.
    """
    size = left.shape[1] // num_groups
    columns = left[:, : size * num_groups].t().reshape(num_groups, size, -1)
    return columns.transpose(1, 2).bmm(right[: size * num_groups].reshape(num_groups, size, -1))


def _grouped_mm(left: Tensor, right: Tensor, offs: Tensor | None = None, **others: Any) -> Tensor:
    """The grouped product without storage: experts' rows by their matrices, or the gradient of those
    matrices.
    """
    if isinstance(right, CutParameter | CutTranspose):
        return torch_grouped_product(
            left, right, offs=offs, **others
        )  # which calls this function again, as it does torch's
    if right.dim() == 3:
        result: Tensor = _GroupedProduct.apply(left, right)
        return result
    assert offs is not None
    return _products_of_groups(left, right, offs.shape[0])


@contextmanager
def traced_kernels(device_kind: str, *, packing: bool) -> Iterator[list[torch.Size]]:
    """Send attention and dropout to the kernels that the device would pick.

    Also answers transformers' question whether position ids describe packed rows, which reads values: yes,
    with packing. Yields the shapes of what was asked about: none for a model that never asks.
    """
    kernel = {"cpu": _attention_cpu, "mps": _attention_math}.get(device_kind, _attention_cuda)

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        query, key, value, mask = autocast_operands(query, key, value, attn_mask)
        if mask is not None and mask.dtype == torch.bool:  # to be added, whichever kernel comes next
            mask = torch.zeros_like(mask, dtype=query.dtype)
        return kernel(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)

    asked: list[torch.Size] = []

    def packed_rows(position_ids: Tensor) -> Tensor | None:
        if not packing:
            return None
        asked.append(position_ids.shape)
        before = position_ids[:, :1] - 1
        return (torch.diff(position_ids, prepend=before, dim=-1) != 1).cumsum(-1)

    with ExitStack() as stack:
        stack.enter_context(_replaced(F, "scaled_dot_product_attention", attention))
        stack.enter_context(_replaced(masking_utils, "find_packed_sequence_indices", packed_rows))
        stack.enter_context(_replaced(masking_utils, "_ignore_bidirectional_mask_sdpa", lambda *args, **kwargs: False))
        # Asked of a decoder's mask, whose padding is on the right and not in it.
        stack.enter_context(_replaced(masking_utils, "fast_all", lambda mask: True))
        stack.enter_context(_replaced(torch, "_grouped_mm", _grouped_mm))
        if device_kind == "cpu":
            # Activation checkpointing keeps the generator's state for every layer, in the memory that is
            # planned here.
            stack.enter_context(_replaced(torch, "get_rng_state", _rng_state))
            stack.enter_context(_replaced(torch, "set_rng_state", lambda state: None))
        else:
            stack.enter_context(_replaced(F, "dropout", _dropout_cuda))
        yield asked


@contextmanager
def _replaced(module: ModuleType, name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)


def kernel_scratch_bytes(func: Any, args: Any, out: Any, device_kind: str) -> int:
    """Bytes that a kernel takes from the allocator and gives back before it returns; 0 for most."""
    packet = func.overloadpacket
    if device_kind == "cpu":
        scratch = _CPU_SCRATCH.get(packet)
        if scratch is not None:
            return scratch(args, out)
        return _promotion_bytes(args, out) if torch.Tag.pointwise in func.tags else 0
    if packet is _aten._scaled_dot_product_flash_attention_backward:
        query, key = args[1:3]
        batch_size, num_heads, seq_len, head_dim = query.shape
        return attention_backward_scratch_bytes(
            batch_size, num_heads, key.shape[1], seq_len, head_dim, query.element_size()
        )
    return 0


def attention_backward_scratch_bytes(
    batch_size: int, num_heads: int, num_key_value_heads: int, seq_len: int, head_dim: int, itemsize: int
) -> int:
    """Temporaries inside FlashAttention-2's backward kernel on CUDA, which meta kernels do not allocate.

    An fp32 accumulator of the query gradient and the row sums (sequence padded to 128, head size to 32 or,
    above 192, to 256), and, with grouped queries, key and value gradients of every query head before they are
    summed. Source: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd.
    """
    rows = batch_size * num_heads * round_up(seq_len, 128)
    padded_head_dim = round_up(head_dim, 32) if head_dim <= 192 else 256
    accumulators = rows * (padded_head_dim + 1) * 4
    if num_heads == num_key_value_heads:
        return accumulators
    return accumulators + 2 * batch_size * num_heads * seq_len * head_dim * itemsize


def _promotion_bytes(args: Any, out: Any) -> int:
    """Copies in the common data type: on the CPU, element-wise kernels take operands of one type only."""
    if not isinstance(out, Tensor):
        return 0
    tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.dim()]
    if len({tensor.dtype for tensor in tensors}) < 2:
        return 0
    common = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return sum(tensor.numel() * common.itemsize for tensor in tensors if tensor.dtype != common)


def _attention_splits(query: Tensor, key: Tensor) -> tuple[int, int]:
    """Rows of queries and of keys in one block of the CPU's flash attention (FlashAttentionKernel.cpp)."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    rows = 256 if num_queries >= 768 else 64 if num_queries >= 192 else 32
    return min(rows, num_queries), min(512, num_keys)


def _flash_forward_cpu(args: Any, out: Any) -> int:
    query, key = args[0], args[1]
    rows, columns = _attention_splits(query, key)
    scores = rows * columns
    reduced = 0 if query.dtype == torch.float32 else scores * query.element_size()
    accumulators: int = 4 * (scores + 2 * rows + rows * query.shape[3])
    return host_threads() * (accumulators + reduced)


def _flash_backward_cpu(args: Any, out: Any) -> int:
    upstream, query, key = args[0], args[1], args[2]
    rows, columns = _attention_splits(query, key)
    reduced = 0 if query.dtype == torch.float32 else query.element_size()
    contiguous = 0 if upstream.is_contiguous() else upstream.numel() * upstream.element_size()
    products = 0 if query.dtype == torch.float32 else ONEDNN_SCRATCH_BYTES
    blocks = 2 * rows * columns * (4 + reduced) + products
    return int(contiguous + 4 * rows + host_threads() * blocks)


def _product_cpu(args: Any, out: Any) -> int:
    """Buffers of oneDNN for a bf16 product; fp32 goes to MKL, which takes none from the allocator."""
    left, right = [arg for arg in args if isinstance(arg, Tensor) and arg.dim() >= 2][-2:]
    if left.dtype == torch.float32:
        return 0
    inner = right.shape[-2]
    is_transposed = left.stride(-1) != 1
    size_bytes = min(ONEDNN_TRANSPOSED_BYTES * inner, ONEDNN_TRANSPOSED_MAX_BYTES) if is_transposed else 0
    return host_threads() * max(size_bytes, ONEDNN_SCRATCH_BYTES)


def _norm_cpu(args: Any, out: Any) -> int:
    """The CPU casts the whole input to the type of the norm."""
    source: Tensor = args[0]
    return 0 if source.dtype == out.dtype else source.numel() * out.element_size()


_CPU_SCRATCH: dict[Any, Callable[[Any, Any], int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _flash_forward_cpu,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward_cpu,
    _aten.mm: _product_cpu,
    _aten.addmm: _product_cpu,
    _aten.bmm: _product_cpu,
    _aten.baddbmm: _product_cpu,
    _aten.linalg_vector_norm: _norm_cpu,
}
