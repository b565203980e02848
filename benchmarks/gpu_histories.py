"""Memory histories that torch records on a GPU: kept in a file, and replayed by the allocator's simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from chunkplan.planner.allocator.caching import CachingAllocator

KINDS = {"alloc": 2, "free_completed": 3, "segment_alloc": 4, "segment_free": 5}


def keep_history(events: list[dict[str, Any]], path: Path) -> None:
    """Write a history as rows of kind, address, size and stream, the kinds as in KINDS."""
    rows = [
        (KINDS[event["action"]], event["addr"], event["size"], event.get("stream", 0))
        for event in events
        if event["action"] in KINDS
    ]
    np.savez_compressed(path, history=np.array(rows, dtype=np.int64))


def simulate(events: list[dict[str, Any]]) -> tuple[int, int, int]:
    """Peaks of reserved bytes of a memory history: by the simulator, and as recorded; and frees of unknown
    blocks.
    """
    allocator = CachingAllocator()
    blocks: dict[int, int] = {}
    streams: dict[int, int] = {}
    reserved = recorded = num_unknown = 0
    for number, event in enumerate(events):
        action, address = event["action"], event["addr"]
        if action == "alloc":
            blocks[address] = number
            allocator.malloc(number, event["size"], streams.setdefault(event.get("stream", 0), len(streams)))
        elif action == "free_completed":
            if address in blocks:
                allocator.free(blocks.pop(address))
            else:
                num_unknown += 1
        elif action in ("segment_alloc", "segment_map"):
            reserved += event["size"]
            recorded = max(recorded, reserved)
        elif action in ("segment_free", "segment_unmap"):
            reserved -= event["size"]
    return allocator.max_reserved_bytes, recorded, num_unknown
