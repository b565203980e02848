"""How states travel between host and device while a chunk is updated block by block.

On a GPU, a block's states are copied in on one side stream while the block before it is copied out on
another: two buffers take turns, and the device holds no more than two blocks' states. On the CPU copies and
updates follow one another, with one buffer.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chunkplan.engine.optimizer.state_layout import StateLayout, StateTensor, largest_tensors

BlockKey = tuple[int, int]
"""Ordinal of the slice in its chunk, and first element of the block; WHOLE: the slice, not a block."""
WHOLE = -1
States = dict[str, Tensor]
"""Tensors by name: ``moment0``, ``scale0``, …, ``row``, ``column``, ``residual``, ``master``."""


@dataclass(slots=True)
class ChunkStates:
    """Holds one chunk's states: its number of updates, the run's number of the last, and its
    blocks' states.
    """

    num_updates: int = 0
    last_update: int = -1
    host: dict[BlockKey, States] = field(default_factory=dict)
    device: dict[BlockKey, States] = field(default_factory=dict)


class Lane:
    """Where copies run: here in the order of the program, between the updates."""

    def __init__(self, ahead: int = 0) -> None:
        self.ahead = ahead
        """How many blocks' states are brought before their turn."""

    def bring(self, copy: Callable[[], None], after: Any) -> Any:
        """Copy in after all work so far, and after the ticket ``after`` of a copy out (or None).

        Returns:
            A ticket to wait for.
        """
        copy()

    def send(self, copy: Callable[[], None]) -> Any:
        """Copy out after all work so far; return a ticket, after which earlier ones are done too."""
        copy()

    def wait(self, ticket: Any) -> None:
        """Work that is started from now on runs after the ticket's copy."""

    def settle(self) -> None:
        """Return when all copies are done: the host may then read what came home."""


class SideStreams(Lane):
    """Copies on a stream for each direction, one block ahead of the updates."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(ahead=1)
        self._device = device
        self._incoming = torch.cuda.Stream(device)
        self._outgoing = torch.cuda.Stream(device)

    def bring(self, copy: Callable[[], None], after: torch.cuda.Event | None) -> torch.cuda.Event:
        """See :meth:`Lane.bring`; returns at once."""
        if after is not None:
            self._incoming.wait_event(after)
        return self._run(self._incoming, copy)

    def send(self, copy: Callable[[], None]) -> torch.cuda.Event:
        """See :meth:`Lane.send`; returns at once."""
        return self._run(self._outgoing, copy)

    def _run(self, stream: torch.cuda.Stream, copy: Callable[[], None]) -> torch.cuda.Event:
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            copy()
        return stream.record_event()

    def wait(self, ticket: torch.cuda.Event) -> None:
        """See :meth:`Lane.wait`; the host does not wait."""
        torch.cuda.current_stream(self._device).wait_event(ticket)

    def settle(self) -> None:
        """See :meth:`Lane.settle`."""
        self._outgoing.synchronize()


def lane_for(device: torch.device) -> Lane:
    """The lane that serves a device."""
    return SideStreams(device) if device.type == "cuda" else Lane()


class StateTransfer:
    """The states of some slices during one update: they come block by block, and leave in the same way.

    Args:
        chunk: whose ``host`` and ``device`` are kept up to date.
        layout: which states there are, and which stay in host memory.
        lane: where the copies run.
        wanted: the tensors of every block, in the order of the updates.
        device: of the weights.
        passes_through: all states both come and leave: ``lane.ahead`` + 1 buffers, allocated here, are lent
            to the blocks in turn.
    """

    def __init__(
        self,
        chunk: ChunkStates,
        layout: StateLayout,
        lane: Lane,
        wanted: dict[BlockKey, dict[str, StateTensor]],
        device: torch.device,
        *,
        passes_through: bool,
    ) -> None:
        self._chunk, self._layout, self._lane, self._device = chunk, layout, lane, device
        self._wanted, self._passes_through = wanted, passes_through
        order = [key for key in wanted if key[1] != WHOLE]
        self._following = {key: order[i + 1 : i + 1 + lane.ahead] for i, key in enumerate(order)}
        self._arrivals: dict[BlockKey, Any] = {}
        self._lent: dict[BlockKey, States] = {}
        self._leaving: list[States] = []
        self._last_sent: Any = None
        num_buffers = min(1 + lane.ahead, len(order)) if passes_through else 0
        largest = largest_tensors([wanted[key] for key in order])
        self.spare: list[tuple[States, Any]] = [(self._new(largest), None) for _ in range(num_buffers)]
        """Buffers that no block has now, and the copy out of each that a copy in must come after."""

    def take(self, key: BlockKey) -> States:
        """Return a block's states, there for the work that starts next; the following blocks' are on their
        way.
        """
        for due in (key, *self._following.get(key, ())):
            if due not in self._chunk.device:
                self._come(due)
        if key in self._arrivals:
            self._lane.wait(self._arrivals.pop(key))
        return self._chunk.device[key]

    def _come(self, key: BlockKey) -> None:
        tensors, after = self._wanted[key], None
        if self._passes_through and key[1] != WHOLE:
            self._lent[key], after = self.spare.pop()
            here = {name: self._lent[key][name][: tensor.numel] for name, tensor in tensors.items()}
        else:
            here = self._new(tensors)
        home = self._chunk.host.get(key, {})

        def copy() -> None:
            for name, tensor in here.items():
                if name in home:
                    tensor.copy_(home[name], non_blocking=True)
                else:
                    tensor.zero_()

        self._arrivals[key] = self._lane.bring(copy, after)
        self._chunk.device[key] = here

    def _new(self, tensors: dict[str, StateTensor]) -> States:
        return {
            name: torch.empty(tensor.numel, dtype=getattr(torch, tensor.dtype), device=self._device)
            for name, tensor in tensors.items()
        }

    def leave(self, key: BlockKey) -> None:
        """Send home what outlives the visit, after the work that was started so far; the rest is dropped."""
        here, sent = self._chunk.device.pop(key), None
        staying = {name: tensor for name, tensor in here.items() if self._layout.stays(name)}
        if staying:
            home = self._chunk.host.setdefault(key, {})
            home |= {name: host_like(tensor) for name, tensor in staying.items() if name not in home}

            def copy() -> None:
                for name, tensor in staying.items():
                    home[name].copy_(tensor, non_blocking=True)

            sent = self._lane.send(copy)
            self._last_sent = sent
        if key in self._lent:
            self.spare.append((self._lent.pop(key), sent))
        elif sent is not None:
            self._leaving.append(staying)

    def close(self) -> None:
        """Give the memory back: whoever gets it next runs after the last copy out of it."""
        if self._last_sent is not None:
            self._lane.wait(self._last_sent)
        self.spare.clear()
        self._leaving.clear()


def host_like(tensor: Tensor) -> Tensor:
    """Return host memory for a state: pinned for a GPU; on the CPU, pages outside torch's allocator."""
    if tensor.device.type == "cpu":
        pages = mmap.mmap(-1, max(tensor.numel() * tensor.element_size(), 1))
        return torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel())
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
