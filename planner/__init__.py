"""chunkplan's planner: which run fits which device, how fast, and what its memory will do.

    from planner import PlanRequest, plan
    answer = plan(PlanRequest(model="llama-3-8b", gpu="rtx-4090"))
    print(answer.fits, answer.peak.upper_bytes)

Imports no torch; tracing a new block does, later and only then. Names are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chunkplan.planner.answers.plan import plan
    from chunkplan.planner.answers.timeline import timeline
    from chunkplan.planner.spec import GpuSpec, Plan, PlanRequest, Timeline

__all__ = ["GpuSpec", "Plan", "PlanRequest", "Timeline", "plan", "timeline"]

_HOMES = {
    "GpuSpec": "chunkplan.planner.spec",
    "Plan": "chunkplan.planner.spec",
    "PlanRequest": "chunkplan.planner.spec",
    "Timeline": "chunkplan.planner.spec",
    "plan": "chunkplan.planner.answers.plan",
    "timeline": "chunkplan.planner.answers.timeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'planner' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
