"""What a plan bounds, and the first moment at which an attempt is above it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chunkplan.engine.protocol import Event, FinishedEvent, StepEvent
from chunkplan.planner.spec import Peak


def bounds_of(peak: Peak, extra_bytes: int, device_kind: str) -> dict[str, int]:
    """Bounds of what a trainer measures, by the sample's figure; each with the margin of the plan's upper
    bound.

    Args:
        peak: the plan's.
        extra_bytes: by how much an earlier attempt was above its plan.
        device_kind: on the CPU, the device's memory is the process's; on a GPU, what the allocator reserves.
    """
    margin = peak.upper_bytes - peak.device_bytes + extra_bytes
    bounds = {"allocated_bytes": peak.allocated_bytes + margin}
    if device_kind == "cpu":
        return bounds | {"host_bytes": peak.upper_bytes + extra_bytes}
    return bounds | {"reserved_bytes": peak.reserved_bytes + margin}


def drift(message: Event, bounds: Mapping[str, int]) -> dict[str, Any] | None:
    """What a message reports above a bound: the figure that is furthest above; None when there is none."""
    if isinstance(message, FinishedEvent):
        place = {"step": message.step, "chunk_index": None, "phase": None}
        figures = [place | _above("host_bytes", message.process_peak_bytes or 0, bounds)]
    elif isinstance(message, StepEvent):
        place = {"step": message.step, "chunk_index": message.chunk_index}
        figures = [
            place | {"phase": sample.phase} | _above(name, getattr(sample, name), bounds)
            for sample in message.samples
            for name in bounds
        ]
    else:
        return None
    worst = max(figures, key=lambda figure: figure["excess_bytes"], default=None)
    return worst if worst is not None and worst["excess_bytes"] > 0 else None


def _above(name: str, measured_bytes: int, bounds: Mapping[str, int]) -> dict[str, Any]:
    bound_bytes = bounds.get(name, measured_bytes)
    excess_bytes = measured_bytes - bound_bytes
    return {"figure": name, "measured_bytes": measured_bytes, "bound_bytes": bound_bytes, "excess_bytes": excess_bytes}
