"""Which sums of gradients autograd forms in place. Imports torch.

Where two gradients meet, autograd adds the later one to the earlier one in place if nobody else holds that.
It never does so for tensors without storage or under a dispatch mode, so that a trace sees a third tensor
that a real run does not have; here such a sum is told from the others by who holds its first operand.

Source: ``can_accumulate_inplace`` in torch/csrc/autograd/input_buffer.cpp.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from chunkplan.engine.torch_internals import TorchDispatchMode, holders

Holders = tuple[int, int, int]


def is_in_place(func: Any, args: Any) -> bool:
    """True when a real run would put the result of ``func`` where its first operand is. Call it in a dispatch
    mode.
    """
    if func is not torch.ops.aten.add.Tensor or torch.is_grad_enabled():
        return False
    return _holders(args) == unheld() and _are_alike(*args[:2])


def _holders(args: Any) -> Holders:
    """References to the first operand: from Python, from C++, and to its storage."""
    return sys.getrefcount(args[0]), *holders(args[0])


def _are_alike(first: Tensor, second: Any) -> bool:
    return (
        isinstance(second, Tensor)
        and first.dtype == second.dtype
        and first.shape == second.shape
        and first.numel() * first.element_size() == first.untyped_storage().nbytes()
    )


@cache
def unheld() -> Holders:
    """What is said of an operand that only autograd holds: seen where that is so by construction.

    Must have been called outside any backward pass before :func:`is_in_place` is.
    """
    seen: list[Holders] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.add.Tensor and not torch.is_grad_enabled():
                seen.append(_seen_from_a_caller(args))
            return func(*args, **(kwargs or {}))

    with Watch(), torch.enable_grad():
        leaf = torch.empty(2, device="meta", requires_grad=True)
        torch.autograd.backward([leaf.sin(), leaf.cos()], [torch.empty(2, device="meta")] * 2)
    (holders,) = seen
    return holders


def _seen_from_a_caller(args: Any) -> Holders:
    """As many frames away from the dispatch mode as :func:`is_in_place` is: frames hold references, too."""
    return _holders(args)
