"""How fast the planner's parts are on this machine. Run: ``python -m benchmarks.planner_speed [--json]``."""

from __future__ import annotations

import argparse
import json
import random
import time

from planner.allocator import MIB, CachingAllocator
from planner.catalog import find_gpu, find_model, gpus, models

Event = tuple[int, int]
"""(block id, bytes); negative bytes free the block."""


def training_like_events(num_events: int, num_live: int, seed: int = 0) -> list[Event]:
    """Allocations and frees in the mixture of sizes and lifetimes of a training step; half of the frees are last-in."""
    generator = random.Random(seed)
    events: list[Event] = []
    live: list[int] = []
    next_id = 0
    while len(events) < num_events:
        if not live or (len(live) < num_live and generator.random() < 0.55):
            size_bytes = generator.choice(
                (generator.randrange(512, MIB), generator.randrange(MIB, 200 * MIB), 2048 * 4096 * 2, 4096 * 2)
            )
            events.append((next_id, size_bytes))
            live.append(next_id)
            next_id += 1
        else:
            position = -1 if generator.random() < 0.5 else generator.randrange(len(live))
            events.append((live.pop(position), -1))
    return events


def allocator_events_per_second(expandable_segments: bool, num_live: int, num_events: int = 300_000) -> float:
    """Simulated events per second with up to ``num_live`` live blocks."""
    events = training_like_events(num_events, num_live)
    allocator = CachingAllocator(expandable_segments=expandable_segments)
    started = time.perf_counter()
    for block_id, size_bytes in events:
        if size_bytes < 0:
            allocator.free(block_id)
        else:
            allocator.malloc(block_id, size_bytes)
    return num_events / (time.perf_counter() - started)


def catalog_load_seconds() -> float:
    """Reading both catalogs for the first time in this process."""
    started = time.perf_counter()
    gpus(), models(), find_gpu("rtx-4090"), find_model("llama-3-8b")
    return time.perf_counter() - started


def measure() -> dict[str, float]:
    """Every figure by name."""
    figures = {"catalog_load_seconds": catalog_load_seconds()}
    for mode in ("classic", "expandable"):
        for num_live in (50, 400, 2000):
            rate = allocator_events_per_second(mode == "expandable", num_live)
            figures[f"allocator_{mode}_{num_live}_live_events_per_second"] = round(rate)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    figures = measure()
    if arguments.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:55s} {value:>14,.4f}" if value < 1 else f"{name:55s} {value:>14,.0f}")


if __name__ == "__main__":
    main()
