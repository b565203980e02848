"""Watches what a step allocates, frees and computes, on tensors without storage. Imports torch.

Storages are watched, not tensors (views are free), and a storage's end is seen by a weak reference. What an
operation returns and costs follows from the shapes that it is given: torch is asked once, which is most of a
trace's time.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from chunkplan.engine.torch_internals import TorchDispatchMode, storage_key
from chunkplan.planner.trace.gradient_sums import is_in_place, unheld
from chunkplan.planner.trace.kernels import kernel_scratch_bytes
from chunkplan.planner.trace.step_trace import CATEGORIES, Segment

_NO_WORK = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided, torch.ops.aten.new_empty}
_WRITES = {torch.ops.aten.copy_, torch.ops.aten.zero_, torch.ops.aten.fill_}
_ACTIVATIONS, _WORKSPACE = CATEGORIES.index("activations"), CATEGORIES.index("workspace")


@dataclass(frozen=True, slots=True)
class OperationOutcome:
    """What an operation returns and costs, given its arguments' shapes."""

    tensors: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype] | None, ...]
    """Shape, strides and type of each new tensor; None for an output that is no tensor."""
    is_single: bool
    """The output is a tensor, not a tuple of them."""
    size_bytes: tuple[int, ...]
    """Size of each tensor's storage."""
    scratch_bytes: int
    work: tuple[int, int] | None
    """FLOPs and bytes moved; None for what only makes room."""


Known: TypeAlias = dict[Any, OperationOutcome | None]
"""Outcomes by operation and arguments' shapes; None where torch must be asked each time."""


class MemoryTrace(TorchDispatchMode):
    """Records allocations, frees and work of everything that runs inside it, under the current segment.

    Args:
        device_kind: decides which scratch kernels take.
        known: shared by traces for the same device kind; filled here.
    """

    def __init__(self, device_kind: str, known: Known | None = None) -> None:
        super().__init__()
        self._known: Known = {} if known is None else known
        unheld()
        self.sizes: list[int] = []
        self.categories: list[int] = []
        self.segments: list[tuple[str, int, list[int], Counter[tuple[int, int]]]] = []
        self.category = _ACTIVATIONS
        self._device_kind = device_kind
        self._live: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._events: list[int] = []
        self._taken_over: int | None = None
        """Block that the next tensor gets."""
        self._work: Counter[tuple[int, int]] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; torch's guard against it would be half of the cost of watching."""
        return False

    def enter_segment(self, phase: str, place: int) -> None:
        """Everything from now on belongs to this place in this phase."""
        if self.segments and self.segments[-1][:2] == (phase, place):
            return
        self._events, self._work = [], Counter()
        self.segments.append((phase, place, self._events, self._work))

    def ignore(self, tensor: Tensor) -> None:
        """Do not count the tensor's storage: it was there before the step."""
        storage = tensor.untyped_storage()
        self._live[storage_key(storage)] = (-1, weakref.ref(storage, self._forget(storage_key(storage))))

    def block_of(self, tensor: Tensor) -> int:
        """The block that holds the tensor, or −1."""
        entry = self._live.get(storage_key(tensor.untyped_storage()))
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
        key = storage_key(tensor.untyped_storage())
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
        kind = _kind(func)
        if kind == _VIEWS:
            return func(*args, **kwargs)
        if kind == _OTHER:
            return self._run(func, args, kwargs)
        if is_in_place(func, args):
            self._taken_over = self._take_over(args[0])
        key = func, _signature(args), _signature(tuple(kwargs.items())) if kwargs else ()
        try:
            outcome = self._known[key]
        except KeyError:
            out = self._run(func, args, kwargs)
            self._known[key] = self._outcome(func, args, kwargs, out)
            return out
        if outcome is None:
            return self._run(func, args, kwargs)
        made = self._again(outcome)
        return made if kind == _MAKES else args[0]

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Ask torch, and record what has become of it."""
        out = func(*args, **kwargs)
        is_new = False
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage_key(storage) not in self._live:
                    is_new = True
                    self._watch(storage, storage.nbytes())
        scratch = kernel_scratch_bytes(func, args, out, self._device_kind)
        if scratch:
            self._events.append(-1 - self._allocate(scratch, _WORKSPACE))
        if (is_new and func.overloadpacket not in _NO_WORK) or func._schema.is_mutable:
            self._work[_work(func, args, kwargs, out)] += 1
        return out

    def _again(self, outcome: OperationOutcome) -> Any:
        """What :meth:`_run` would do, without asking torch."""
        made: list[Tensor | None] = []
        sizes = iter(outcome.size_bytes)
        for like in outcome.tensors:
            if like is None:
                made.append(None)
                continue
            tensor = torch.empty_strided(like[0], like[1], dtype=like[2], device="meta")
            made.append(tensor)
            self._watch(tensor.untyped_storage(), next(sizes))
        if outcome.scratch_bytes:
            self._events.append(-1 - self._allocate(outcome.scratch_bytes, _WORKSPACE))
        if outcome.work is not None:
            self._work[outcome.work] += 1
        return made[0] if outcome.is_single else tuple(made)

    def _watch(self, storage: Any, size_bytes: int) -> None:
        key = storage_key(storage)
        block, self._taken_over = self._taken_over, None
        if block is None:
            block = self._allocate(size_bytes, self.category) if size_bytes else -1
        self._live[key] = (block, weakref.ref(storage, self._forget(key)))

    def _outcome(self, func: Any, args: Any, kwargs: Any, out: Any) -> OperationOutcome | None:
        """None when what is returned is neither new tensors, each with its own storage, nor the first
        argument.
        """
        work = None if func.overloadpacket in _NO_WORK else _work(func, args, kwargs, out)
        scratch = kernel_scratch_bytes(func, args, out, self._device_kind)
        if _kind(func) == _CHANGES:
            return OperationOutcome((), False, (), scratch, work) if out is args[0] else None
        is_single = isinstance(out, Tensor)
        outputs: tuple[Any, ...] = (out,) if is_single else tuple(out) if isinstance(out, tuple) else ()
        tensors = [value for value in outputs if isinstance(value, Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        given = {storage_key(tensor.untyped_storage()) for tensor in _tensors((*args, *kwargs.values()))}
        own = {storage_key(storage) for storage in storages}
        fits = all(
            storage.nbytes() == torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta").nbytes
            for t, storage in zip(tensors, storages, strict=True)
        )
        others = any(value is not None and not isinstance(value, Tensor) for value in outputs)
        if not tensors or others or not fits or own & given or len(own) < len(tensors):
            return None
        return OperationOutcome(
            tuple((v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else None for v in outputs),
            is_single,
            tuple(storage.nbytes() for storage in storages),
            scratch,
            work,
        )


_MAKES, _VIEWS, _CHANGES, _OTHER = range(4)


@cache
def _kind(func: Any) -> int:
    """Makes tensors, returns a view of its argument, or changes the values of its first argument; by its
    schema.
    """
    schema = func._schema
    if not schema.is_mutable:
        returned = [value.alias_info is not None for value in schema.returns]
        return _VIEWS if returned and all(returned) else _OTHER if any(returned) else _MAKES
    written = [value.alias_info is not None and value.alias_info.is_write for value in schema.arguments]
    is_in_place = written[0] and not any(written[1:]) and len(schema.returns) == 1
    keeps_shape = torch.Tag.pointwise in func.tags or func.overloadpacket in _WRITES
    return _CHANGES if is_in_place and keeps_shape else _OTHER


def _signature(values: Any) -> tuple[Any, ...]:
    """What decides the outcome of an operation on these arguments; 1, 1.0 and True are three values."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, tuple | list):
            found.append(_signature(value))
        else:
            found.append((type(value), value))
    return tuple(found)


def _work(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[int, int]:
    counter = flop_registry.get(func.overloadpacket)
    flops = int(counter(*_with_equal_heads(func, args), **kwargs, out_val=out)) if counter else 0
    return flops, sum(_tensor_bytes(value) for value in (*args, *kwargs.values(), out))


_FIRST_QUERY = {
    torch.ops.aten._scaled_dot_product_flash_attention: 0,
    torch.ops.aten._scaled_dot_product_flash_attention_backward: 1,
}
"""Attention that takes fewer key heads than query heads, and where its query stands among its arguments."""


def _with_equal_heads(func: Any, args: Any) -> Any:
    """Arguments whose keys and values have the queries' heads: torch 2.11 counts no others, and every query
    head does its own work.
    """
    first = _FIRST_QUERY.get(func.overloadpacket)
    if first is None or args[first].shape[1] == args[first + 1].shape[1]:
        return args
    num_heads = args[first].shape[1]
    grouped = (x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in args[first + 1 : first + 3])
    return (*args[: first + 1], *grouped, *args[first + 3 :])


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, tuple | list):
        return sum(_tensor_bytes(item) for item in value)
    return 0
