"""Watches what a step allocates, frees and computes, on tensors without storage. Imports torch.

Storages are watched, not tensors (views are free), and a storage's end is seen by a weak reference.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from planner.accumulation import is_in_place, unheld
from planner.kernels import kernel_scratch_bytes
from planner.segments import CATEGORIES, Segment

_NO_WORK = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided, torch.ops.aten.new_empty}
_ACTIVATIONS, _WORKSPACE = CATEGORIES.index("activations"), CATEGORIES.index("workspace")


class MemoryTrace(TorchDispatchMode):
    """Records allocations, frees and work of everything that runs inside it, under the current segment."""

    def __init__(self, device_kind: str) -> None:
        super().__init__()
        unheld()
        self.sizes: list[int] = []
        self.categories: list[int] = []
        self.segments: list[tuple[str, int, list[int], Counter[tuple[int, int]]]] = []
        self.category = _ACTIVATIONS
        self._device_kind = device_kind
        self._live: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._events: list[int] = []
        self._work: Counter[tuple[int, int]] = Counter()

    def enter_segment(self, phase: str, place: int) -> None:
        """Everything from now on belongs to this place in this phase."""
        if self.segments and self.segments[-1][:2] == (phase, place):
            return
        self._events, self._work = [], Counter()
        self.segments.append((phase, place, self._events, self._work))

    def ignore(self, tensor: Tensor) -> None:
        """Do not count the tensor's storage: it was there before the step."""
        storage = tensor.untyped_storage()
        self._live[storage._cdata] = (-1, weakref.ref(storage, self._forget(storage._cdata)))

    def block_of(self, tensor: Tensor) -> int:
        """The block that holds the tensor, or −1."""
        entry = self._live.get(tensor.untyped_storage()._cdata)
        return entry[0] if entry else -1

    def finished_segments(self) -> tuple[Segment, ...]:
        """What was recorded, as data."""
        return tuple(
            Segment(phase, place, tuple(events), tuple((*key, count) for key, count in work.items()))
            for phase, place, events, work in self.segments
        )

    def _forget(self, key: int) -> Callable[[Any], None]:
        def callback(_: Any) -> None:
            block, _reference = self._live.pop(key)
            if block >= 0:
                self._events.append(-1 - block)

        return callback

    def _take_over(self, tensor: Tensor) -> int:
        """The tensor's block, which another tensor gets: the end of this one no longer frees it."""
        key = tensor.untyped_storage()._cdata
        block, reference = self._live[key]
        self._live[key] = (-1, reference)
        return block

    def _allocate(self, size_bytes: int, category: int) -> int:
        self.sizes.append(size_bytes)
        self.categories.append(category)
        self._events.append(len(self.sizes) - 1)
        return len(self.sizes) - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        taken_over = self._take_over(args[0]) if is_in_place(func, args) else None
        out = func(*args, **kwargs)
        outputs = out if isinstance(out, tuple | list) else (out,)
        is_new = False
        for tensor in outputs:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._live:
                is_new = True
                size_bytes = storage.nbytes()
                block = taken_over
                if block is None:
                    block = self._allocate(size_bytes, self.category) if size_bytes else -1
                self._live[key] = (block, weakref.ref(storage, self._forget(key)))
        scratch = kernel_scratch_bytes(func, args, out, self._device_kind)
        if scratch:
            self._events.append(-1 - self._allocate(scratch, _WORKSPACE))
        if (is_new and func.overloadpacket not in _NO_WORK) or func._schema.is_mutable:
            self._count_work(func, args, kwargs, out)
        return out

    def _count_work(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        counter = flop_registry.get(func.overloadpacket)
        flops = int(counter(*args, **kwargs, out_val=out)) if counter else 0
        moved = sum(_tensor_bytes(value) for value in (*args, *kwargs.values(), out))
        self._work[flops, moved] += 1


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, tuple | list):
        return sum(_tensor_bytes(item) for item in value)
    return 0
