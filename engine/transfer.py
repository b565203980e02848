"""How states travel between host and device while a slice is updated block by block.

On a GPU, a block's states are copied in on a side stream while the block before it is updated, and home again while
the one after it is: two buffers take turns, and the device holds no more than two blocks' states. On the CPU copies
and updates follow one another, with one buffer.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.states import StateLayout, StateTensor

BlockKey = tuple[int, int]
"""Ordinal of the slice within its chunk, and first element of the block within the slice; WHOLE: of all its blocks."""
WHOLE = -1
States = dict[str, Tensor]
"""Tensors by name: ``moment0``, ``scale0``, …, ``row``, ``column``, ``residual``, ``master``."""


@dataclass(slots=True)
class ChunkStates:
    """One chunk's states: how often it was updated, the run's number of its last update, and its blocks' states."""

    num_updates: int = 0
    last_update: int = -1
    host: dict[BlockKey, States] = field(default_factory=dict)
    device: dict[BlockKey, States] = field(default_factory=dict)


class Lane:
    """Where copies run: here in the order of the program, between the updates."""

    def __init__(self, ahead: int = 0) -> None:
        self.ahead = ahead
        """How many blocks' states are brought before their turn."""

    def run(self, copy: Callable[[], None]) -> Any:
        """Copy after all work that was started so far, and after all copies before; returns a ticket to wait for."""
        copy()

    def wait(self, ticket: Any) -> None:
        """Work that is started from now on runs after the ticket's copy."""

    def settle(self) -> None:
        """Return when all copies are done: the host may then read what came home."""


class SideStream(Lane):
    """Copies on a stream of their own, one block ahead of the updates."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(ahead=1)
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, copy: Callable[[], None]) -> torch.cuda.Event:
        """See :meth:`Lane.run`; returns at once."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy()
        return self._stream.record_event()

    def wait(self, ticket: torch.cuda.Event) -> None:
        """See :meth:`Lane.wait`; the host does not wait."""
        torch.cuda.current_stream(self._device).wait_event(ticket)

    def settle(self) -> None:
        """See :meth:`Lane.settle`."""
        self._stream.synchronize()


def lane_for(device: torch.device) -> Lane:
    """The lane that serves a device."""
    return SideStream(device) if device.type == "cuda" else Lane()


class Passage:
    """The states of one slice during one update: they come block by block, and leave in the same way.

    Args:
        chunk: whose ``host`` and ``device`` are kept up to date.
        layout: which states there are, and which stay in host memory.
        lane: where the copies run.
        wanted: the tensors of each block in the order of the updates, the largest first.
        device: of the weights.
    """

    def __init__(
        self,
        chunk: ChunkStates,
        layout: StateLayout,
        lane: Lane,
        wanted: dict[BlockKey, dict[str, StateTensor]],
        device: torch.device,
    ) -> None:
        self._chunk, self._layout, self._lane, self._device = chunk, layout, lane, device
        self._wanted = wanted
        self._tickets: dict[BlockKey, Any] = {}
        self._buffers: dict[BlockKey, States] = {}
        self._spare: list[States] = []
        self._last_ticket: Any = None

    def take(self, key: BlockKey, following: list[BlockKey]) -> States:
        """A block's states, there for the work that is started next; ``lane.ahead`` of the following are on the way."""
        for wanted in (key, *following[: self._lane.ahead]):
            if wanted not in self._chunk.device:
                self._come(wanted)
        if key in self._tickets:
            self._lane.wait(self._tickets.pop(key))
        return self._chunk.device[key]

    def _come(self, key: BlockKey) -> None:
        tensors = self._wanted[key]
        buffer = self._spare.pop() if self._spare else self._new(tensors)
        here = {name: buffer[name][: tensor.numel] for name, tensor in tensors.items()}
        home = self._chunk.host.get(key, {})

        def copy() -> None:
            for name, tensor in here.items():
                if name in home:
                    tensor.copy_(home[name], non_blocking=True)
                else:
                    tensor.zero_()

        self._tickets[key] = self._lane.run(copy)
        self._buffers[key] = buffer
        self._chunk.device[key] = here

    def _new(self, tensors: dict[str, StateTensor]) -> States:
        return {
            name: torch.empty(tensor.numel, dtype=getattr(torch, tensor.dtype), device=self._device)
            for name, tensor in tensors.items()
        }

    def leave(self, key: BlockKey) -> None:
        """Send home what outlives the visit, after the work that was started so far; the rest is dropped."""
        here = self._chunk.device.pop(key)
        staying = {name: tensor for name, tensor in here.items() if self._layout.stays(name)}
        if staying:
            home = self._chunk.host.setdefault(key, {})
            home |= {name: host_like(tensor) for name, tensor in staying.items() if name not in home}

            def copy() -> None:
                for name, tensor in staying.items():
                    home[name].copy_(tensor, non_blocking=True)

            self._last_ticket = self._lane.run(copy)
        # Lent to the block after the next: its states are copied in by the same lane, so after these are out.
        self._spare.append(self._buffers.pop(key, here))

    def close(self) -> None:
        """Give the buffers back when the last copy out of them is done."""
        if self._last_ticket is not None:
            self._lane.wait(self._last_ticket)
        self._spare.clear()


def host_like(tensor: Tensor) -> Tensor:
    """Host memory for a state: pinned for a GPU; when the device is the CPU, pages outside torch's allocator."""
    if tensor.device.type == "cpu":
        pages = mmap.mmap(-1, max(tensor.numel() * tensor.element_size(), 1))
        return torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel())
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
