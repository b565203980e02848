"""Autocast for tensors without storage, which torch's own passes by. Imports torch.

Engine and checkpointing turn the CPU's autocast on and off; while it is on, operands are cast here as the
planned device would cast them. Which operations are, and that casts of trainable weights are kept until the
outermost context ends, follows torch (autocast_mode.h).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from chunkplan.engine.gradients.cut_parameter import CutParameter, CutTranspose, is_metadata
from chunkplan.engine.torch_internals import tree_any, tree_map_only

_LOWER: frozenset[Callable[..., Any]] = frozenset(
    {
        F.linear, F.conv1d, F.conv2d, torch.conv1d, torch.conv2d, torch.einsum,
        torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__,
        torch.bmm, torch.Tensor.bmm, torch.mm, torch.Tensor.mm, torch.addmm, torch.Tensor.addmm,
        torch.baddbmm, torch.Tensor.baddbmm,
    }
)  # fmt: skip
_EXACT: frozenset[Callable[..., Any]] = frozenset({F.cross_entropy, F.nll_loss, torch.prod, torch.Tensor.prod})
_EXACT_ON_CUDA: frozenset[Callable[..., Any]] = frozenset(
    {
        F.softmax, torch.softmax, torch.Tensor.softmax, F.log_softmax, F.layer_norm, F.softplus,
        torch.exp, torch.Tensor.exp, torch.log, torch.Tensor.log, torch.pow, torch.Tensor.pow, torch.Tensor.__pow__,
        torch.rsqrt, torch.Tensor.rsqrt, torch.sum, torch.Tensor.sum, torch.cumsum, torch.Tensor.cumsum,
        torch.norm, torch.Tensor.norm,
    }
)  # fmt: skip


class _TracedAutocast(TorchFunctionMode):
    """Casts the operands of every operation that the device's autocast knows."""

    def __init__(self, device_kind: str) -> None:
        super().__init__()
        self._exact = _EXACT if device_kind == "cpu" else _EXACT | _EXACT_ON_CUDA
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_autocast_enabled("cpu") or is_metadata(func):
            return func(*args, **kwargs)
        if tree_any(lambda value: isinstance(value, CutParameter | CutTranspose), (args, kwargs)):
            with self:  # what it makes of a cut parameter comes by here again
                return CutParameter.__torch_function__(func, types, args, kwargs)
        if func in _LOWER:
            dtype = torch.get_autocast_dtype("cpu")
        elif func in self._exact:
            dtype = torch.float32
        else:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, lambda tensor: self.cast(tensor, dtype), (args, kwargs))
        return func(*args, **kwargs)

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in a floating-point type; the same copy again for a trainable weight."""
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad) or dtype == torch.float32:
            return tensor.to(dtype)
        if id(tensor) not in self._kept:
            self._kept[id(tensor)] = tensor, tensor.to(dtype)
        return self._kept[id(tensor)][1]

    def forget(self) -> None:
        """The outermost context has ended."""
        self._kept.clear()

    def entered(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """``forward`` under this mode, also when a layer is recomputed: backward passes run without function
        modes.
        """

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return forward(*args, **kwargs)

        return run


@contextmanager
def traced_autocast(device_kind: str, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Cast as the device's autocast does wherever the CPU's is on, in forward and when ``layers`` are
    recomputed.
    """
    mode, clear = _TracedAutocast(device_kind), torch.clear_autocast_cache
    torch.clear_autocast_cache = mode.forget  # what torch.autocast calls when it ends
    for layer in layers:
        layer.forward = mode.entered(layer.forward)
    try:
        with mode:
            yield
    finally:
        torch.clear_autocast_cache = clear
        for layer in layers:
            del layer.forward
