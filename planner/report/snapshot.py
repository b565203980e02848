"""A chunk's visit as a PyTorch memory snapshot, for pytorch.org/memory_viz and torch.cuda._memory_viz. Pure.

The events of a whole cycle (:mod:`chunkplan.planner.footprint.block_events`) pass through the simulated
caching allocator in the schedule's order. Recorded are the weights, as they were loaded, and the visit of one
chunk. Addresses are simulated ones.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from functools import cache
from typing import Any

from chunkplan.engine.spec import ResolvedSchedule
from chunkplan.engine.stream.schedule import Schedule
from chunkplan.planner.allocator.caching import CachingAllocator
from chunkplan.planner.catalog.overheads import Overheads
from chunkplan.planner.footprint.block_events import CycleEvents, Label
from chunkplan.planner.footprint.footprint import ChunkFootprint, Footprints

BASE_ADDRESS = 0x7F00_0000_0000
PICKLE_PROTOCOL = 4
"""The newest that the web page reads."""
_UNKNOWN = "unknown"
"""What the web page wants among the categories; it stands for ``other``."""


def snapshot(
    footprints: Footprints,
    chunks: Iterable[ChunkFootprint],
    schedule: ResolvedSchedule,
    overheads: Overheads,
    chunk_index: int,
) -> dict[str, Any]:
    """The history of one chunk's visit, and what is live after it, in the form of
    ``torch.cuda.memory._snapshot()``.

    Args:
        footprints: of the model under the training spec.
        chunks: all of the schedule.
        schedule: decides what came before, and so where free memory lies.
        overheads: size and number of the libraries' workspaces.
        chunk_index: the chunk whose visit is recorded.
    """
    recorder = _Recorder()
    cycle = CycleEvents(recorder, footprints, schedule)
    cycle.load(overheads)
    by_index = {footprint.chunk.index: footprint for footprint in chunks}
    for index in Schedule(len(by_index), schedule.order, 1).cycle_order(0):
        if index == chunk_index:
            recorder.start()
        cycle.visit(by_index[index])
        if index == chunk_index:
            break
    return {
        "segments": recorder.segments(),
        "device_traces": [recorder.events],
        "allocator_settings": {"expandable_segments": False},
        "external_annotations": [],
    }


def to_pickle(content: dict[str, Any]) -> bytes:
    """The snapshot's file. Pickles are written here, and never read."""
    return pickle.dumps(content, protocol=PICKLE_PROTOCOL)


class _Recorder(CachingAllocator):
    """An allocator that keeps a history from the moment it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []
        self._is_recording = False
        self._segments: list[tuple[int, int]] = []
        self._known: dict[int, tuple[int, Label]] = {}
        """Requested bytes and label of each live block."""

    def start(self) -> None:
        """Begin the history: with everything that is there now, in the order in which it came."""
        self._is_recording = True
        for address, size in self._segments:
            self._record("segment_alloc", address, size, ("segment", "reserved before", "load"))
        for block, (size_bytes, label) in self._known.items():
            self._record("alloc", self._address(block), size_bytes, label)

    def take(self, block: int, size_bytes: int, label: Label) -> None:
        """Allocate a block under its label."""
        reserved = self.reserved_bytes
        begin = self._next_address
        self.malloc(block, size_bytes)
        if self.reserved_bytes > reserved:
            self._segments.append((begin, self._next_address - begin))
            self._record("segment_alloc", *self._segments[-1], label)
        if self._live[block] is not None:
            self._known[block] = (size_bytes, label)
            self._record("alloc", self._address(block), size_bytes, label)

    def give(self, block: int) -> None:
        """Free a block."""
        if block in self._known:
            size_bytes, label = self._known.pop(block)
            for action in ("free_requested", "free_completed"):
                self._record(action, self._address(block), size_bytes, label)
        self.free(block)

    def segments(self) -> list[dict[str, Any]]:
        """All segments with their blocks, live and free."""
        live = sorted((address, size, block) for block, (address, size) in self.live_ranges().items())
        found, position = [], 0
        for begin, total in self._segments:
            blocks, at = [], begin
            while position < len(live) and live[position][0] < begin + total:
                address, size, block = live[position]
                if address > at:
                    blocks.append(_free_block(at, address - at))
                requested, label = self._known[block]
                blocks.append(
                    {
                        "address": BASE_ADDRESS + address,
                        "size": size,
                        "requested_size": requested,
                        "state": "active_allocated",
                        "frames": _frames(label),
                    }
                )
                at, position = address + size, position + 1
            if at < begin + total:
                blocks.append(_free_block(at, begin + total - at))
            found.append(_segment(begin, total, blocks))
        return found

    def _address(self, block: int) -> int:
        found = self._live[block]
        assert found is not None
        return found.address

    def _record(self, action: str, address: int, size_bytes: int, label: Label) -> None:
        if not self._is_recording:
            return
        event = {
            "action": action,
            "addr": BASE_ADDRESS + address,
            "size": size_bytes,
            "stream": 0,
            "frames": _frames(label),
        }
        if action == "alloc":
            event["category"] = _UNKNOWN if label[0] == "other" else label[0]
        self.events.append(event)


def _free_block(address: int, size: int) -> dict[str, Any]:
    return {
        "address": BASE_ADDRESS + address,
        "size": size,
        "requested_size": 0,
        "state": "inactive",
        "frames": [],
    }


def _segment(address: int, total: int, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    allocated = sum(block["size"] for block in blocks if block["state"] == "active_allocated")
    return {
        "device": 0,
        "address": BASE_ADDRESS + address,
        "total_size": total,
        "allocated_size": allocated,
        "active_size": allocated,
        "requested_size": sum(block["requested_size"] for block in blocks),
        "stream": 0,
        "segment_type": "small" if total == 2 * 2**20 else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
        "blocks": blocks,
    }


@cache
def _frames(label: Label) -> list[dict[str, Any]]:
    """What stands for a stack trace: innermost first. One list per label: the pickle refers to it again."""
    category, place, when = label
    return [{"filename": place, "line": 0, "name": category}, {"filename": "plan", "line": 0, "name": when}]
