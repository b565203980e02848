"""Parameters of which only some rows have gradients.

A cut parameter gets the class :class:`CutParameter` while its chunk is active; nothing else about the
instance changes. The class's ``__torch_function__`` routes linear, embedding and addmm, and the ways in which
experts are used (indexed, grouped_mm, bmm), to functions that compute the gradient of the active rows only.
Any other operation sees an alias whose dense gradient is sliced on arrival: always right, at the price of one
dense gradient for a moment.

Source: ChunkFT, arXiv 2605.21177, section on sub-tensor gradients; the class swap is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from chunkplan.engine.model.autocast import autocast_operands
from chunkplan.engine.torch_internals import (
    DIFFERENTIABLE_GETTERS,
    grouped_product,
    torch_grouped_product,
    tree_map,
    without_subclasses,
)


@dataclass(frozen=True, slots=True)
class RowRange:
    """Active rows [start, stop) of a cut parameter, their gradient's leaf, and the weight as a
    plain tensor.
    """

    leaf: Tensor
    weight: Tensor
    start: int
    stop: int


class CutParameter(nn.Parameter):
    """A parameter of which only some rows are active; see the module's docstring."""

    rows: RowRange

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Route ``func`` to its sliced version, or give it an alias of the weight."""
        kwargs = kwargs or {}
        with without_subclasses():
            if torch.is_grad_enabled() and not is_metadata(func):
                sliced = _SLICED.get(func)
                result = sliced(*args, **kwargs) if sliced else None
                if result is not None:
                    return result
                args, kwargs = tree_map(_alias, (args, kwargs))
            return func(*args, **kwargs)


class CutTranspose(Tensor):
    """A 3-D cut parameter with its matrices transposed, as grouped products take it; its ``rows`` are not."""

    rows: RowRange

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Like :meth:`CutParameter.__torch_function__`."""
        return CutParameter.__torch_function__(func, types, args, kwargs)


def _transpose(weight: Any, dim0: int, dim1: int) -> Tensor | None:
    if not isinstance(weight, CutParameter) or weight.dim() != 3 or {dim0 % 3, dim1 % 3} != {1, 2}:
        return None
    transposed = weight.rows.weight.transpose(1, 2).as_subclass(CutTranspose)
    transposed.rows = weight.rows
    return transposed


_METADATA_METHODS = {
    "requires_grad_", "detach", "size", "dim", "numel", "stride", "is_contiguous", "data_ptr", "untyped_storage",
    "element_size", "register_hook", "is_floating_point", "is_complex", "__hash__", "__repr__", "__deepcopy__",
    "__reduce_ex__", "__len__",
}  # fmt: skip


def is_metadata(func: Callable[..., Any]) -> bool:
    """True for attribute reads and methods that no gradient flows through."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return func not in DIFFERENTIABLE_GETTERS
    return name in _METADATA_METHODS


class _SliceOfDense(torch.autograd.Function):
    """Identity on the weight; its dense gradient is cut to the active rows as soon as it arrives."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, weight: Tensor, start: int, stop: int) -> Tensor:
        ctx.range = (start, stop)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        start, stop = ctx.range
        return gradient[start:stop].reshape(-1).clone(), None, None, None


def _alias(value: Any) -> Any:
    if not isinstance(value, CutParameter | CutTranspose):
        return value
    rows = value.rows
    alias: Tensor = _SliceOfDense.apply(rows.leaf, rows.weight, rows.start, rows.stop)
    return alias.transpose(1, 2) if isinstance(value, CutTranspose) else alias


class _SlicedLinear(torch.autograd.Function):
    """y = x Wᵀ + b with dW for rows [start, stop) only: dY[:, start:stop]ᵀ x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, leaf: Tensor, weight: Tensor, bias: Tensor | None, start: int, stop: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        ctx.range = (start, stop)
        ctx.leaf_dtype = leaf.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        start, stop = ctx.range
        dx = dy.matmul(weight) if ctx.needs_input_grad[0] else None
        dy_rows = dy.reshape(-1, dy.shape[-1])
        dw = dy_rows[:, start:stop].t().mm(x.reshape(-1, x.shape[-1])).to(ctx.leaf_dtype)
        db = dy_rows.sum(0) if ctx.needs_input_grad[3] else None
        return dx, dw.view(-1), None, db, None, None


class _SlicedAddmm(torch.autograd.Function):
    """y = b + x W (Conv1D of GPT-2) with dW for rows [start, stop) only: x[:, start:stop]ᵀ dY."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor, weight: Tensor, bias: Tensor, start: int, stop: int) -> Tensor:
        ctx.save_for_backward(x[:, start:stop], weight if ctx.needs_input_grad[0] else None)
        ctx.leaf_dtype = leaf.dtype
        return torch.addmm(bias, x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None, Tensor | None, None, None]:
        x_columns, weight = ctx.saved_tensors
        dx = dy.mm(weight.t()) if ctx.needs_input_grad[0] else None
        dw = x_columns.t().mm(dy).to(ctx.leaf_dtype)
        db = dy.sum(0) if ctx.needs_input_grad[3] else None
        return dx, dw.view(-1), None, db, None, None


class _SlicedEmbedding(torch.autograd.Function):
    """Look-up whose gradient is scattered into rows [start, stop) only."""

    @staticmethod
    def forward(
        ctx: Any, leaf: Tensor, weight: Tensor, ids: Tensor, padding_idx: int | None, start: int, stop: int
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.range = (start, stop, padding_idx)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (ids,) = ctx.saved_tensors
        start, stop, padding_idx = ctx.range
        return _scattered(dy, ids, (start, stop), padding_idx).view(-1), None, None, None, None, None


class _SlicedGroupedProduct(torch.autograd.Function):
    """y = x Wₑ for each group e of rows, with dW of matrices [start, stop) only; maybe transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor, weight: Tensor, offsets: Tensor, start: int, stop: int) -> Tensor:
        ctx.save_for_backward(x, offsets, weight if ctx.needs_input_grad[0] else None)
        ctx.range, ctx.is_transposed = (start, stop), not weight.is_contiguous()
        result: Tensor = grouped_product(x, weight, offs=offsets)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None, None, None, None]:
        x, offsets, weight = ctx.saved_tensors
        start, stop = ctx.range
        dy = dy.contiguous()
        dx = grouped_product(dy, weight.transpose(1, 2), offs=offsets) if ctx.needs_input_grad[0] else None
        begin, end = _group_bounds(offsets, start, stop, x.shape[0])
        left, right = (dy, x) if ctx.is_transposed else (x, dy)
        if begin == end:
            dw = x.new_zeros((stop - start, left.shape[1], right.shape[1]))
        else:
            dw = grouped_product(left[begin:end].t(), right[begin:end], offs=offsets[start:stop] - begin)
        return dx, dw.view(-1), None, None, None, None


def _group_bounds(offsets: Tensor, start: int, stop: int, num_rows: int) -> tuple[int, int]:
    """Return the first rows of group ``start`` and after ``stop - 1``; all rows where values cannot
    be read.
    """
    if offsets.device.type == "meta":
        return 0, num_rows
    return int(offsets[start - 1]) if start else 0, int(offsets[stop - 1])


class _SlicedBatchedProduct(torch.autograd.Function):
    """y[e] = x[e] W[e] with dW of matrices [start, stop) only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor, weight: Tensor, start: int, stop: int) -> Tensor:
        ctx.save_for_backward(x[start:stop], weight if ctx.needs_input_grad[0] else None)
        ctx.range, ctx.leaf_dtype = (start, stop), leaf.dtype
        return torch.bmm(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        x_active, weight = ctx.saved_tensors
        start, stop = ctx.range
        dx = torch.bmm(dy, weight.transpose(1, 2)) if ctx.needs_input_grad[0] else None
        dw = torch.bmm(x_active.transpose(1, 2), dy[start:stop]).to(ctx.leaf_dtype)
        return dx, dw.reshape(-1), None, None, None


class _SlicedRows(torch.autograd.Function):
    """weight[ids] with the gradient of rows [start, stop) only, whatever a row's shape."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, weight: Tensor, ids: Tensor, start: int, stop: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.range, ctx.num_all_rows = (start, stop), weight.shape[0]
        return weight[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        (ids,) = ctx.saved_tensors
        ids = ids.remainder(ctx.num_all_rows)
        dw = _scattered(dy.reshape(*ids.shape, -1), ids, ctx.range)
        return dw.view(-1), None, None, None, None


def _scattered(dy: Tensor, ids: Tensor, active: tuple[int, int], padding_idx: int | None = None) -> Tensor:
    """Return the gradient of a table's active rows [start, stop) from looked-up rows'; padding gets none."""
    start, stop = active
    num_rows = stop - start
    outside = (ids < start) | (ids >= stop)
    if padding_idx is not None:
        outside |= ids == padding_idx
    # The kernel skips its padding index: rows outside the range go there, to one row that is cut off again.
    local = (ids - start).masked_fill_(outside, num_rows)
    dw: Tensor = torch.ops.aten.embedding_dense_backward(dy, local, num_rows + 1, num_rows, False)
    return dw[:num_rows]


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    if not isinstance(weight, CutParameter) or isinstance(x, CutParameter):
        return None
    rows = weight.rows
    x, dense, bias = autocast_operands(x, rows.weight, bias)
    return _SlicedLinear.apply(x, rows.leaf, dense, bias, rows.start, rows.stop)


def _addmm(
    bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Tensor | None:
    is_conv1d = (
        isinstance(weight, CutParameter) and not isinstance(x, CutParameter) and not isinstance(bias, CutParameter)
    )
    if not is_conv1d or beta != 1 or alpha != 1 or out is not None or bias.dim() != 1:
        return None
    rows = weight.rows
    x, dense, bias = autocast_operands(x, rows.weight, bias)
    return _SlicedAddmm.apply(x, rows.leaf, dense, bias, rows.start, rows.stop)


def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    if max_norm is not None or scale_grad_by_freq or sparse:
        return None
    rows = weight.rows
    if padding_idx is not None and padding_idx < 0:
        padding_idx += rows.weight.shape[0]
    return _SlicedEmbedding.apply(rows.leaf, rows.weight, input, padding_idx, rows.start, rows.stop)


def _grouped_mm(
    x: Tensor, weight: Any, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor | None:
    is_known = isinstance(weight, CutParameter | CutTranspose) and not isinstance(x, CutParameter | CutTranspose)
    if not is_known or offs is None or bias is not None or out_dtype is not None or x.dim() != 2:
        return None
    rows = weight.rows
    dense = rows.weight.transpose(1, 2) if isinstance(weight, CutTranspose) else rows.weight
    return _SlicedGroupedProduct.apply(x, rows.leaf, dense, offs, rows.start, rows.stop)


def _bmm(x: Any, weight: Any) -> Tensor | None:
    if not isinstance(weight, CutParameter) or isinstance(x, CutParameter | CutTranspose):
        return None
    if weight.dim() != 3 or x.dim() != 3 or x.shape[0] != weight.shape[0]:
        return None
    rows = weight.rows
    x, dense = autocast_operands(x, rows.weight)
    return _SlicedBatchedProduct.apply(x, rows.leaf, dense, rows.start, rows.stop)


def _getitem(weight: Any, index: Any) -> Tensor | None:
    if not isinstance(weight, CutParameter) or isinstance(index, bool):
        return None
    rows = weight.rows
    if isinstance(index, Tensor):
        if index.dtype not in (torch.int64, torch.int32) or index.device.type == "meta":
            return None
        if index.dim():
            return _SlicedRows.apply(rows.leaf, rows.weight, index, rows.start, rows.stop)
        index = int(index)
    if not isinstance(index, int):
        return None
    row = index % rows.weight.shape[0] if -rows.weight.shape[0] <= index < rows.weight.shape[0] else index
    if not rows.start <= row < rows.stop:
        return rows.weight[row]
    return rows.leaf.view(rows.stop - rows.start, *rows.weight.shape[1:])[row - rows.start]


_SLICED: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.addmm: _addmm,
    torch_grouped_product: _grouped_mm,
    torch.bmm: _bmm,
    torch.matmul: _bmm,
    torch.Tensor.bmm: _bmm,
    torch.Tensor.matmul: _bmm,
    torch.Tensor.__getitem__: _getitem,
    torch.transpose: _transpose,
    torch.Tensor.transpose: _transpose,
}
