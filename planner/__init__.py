"""chunkplan's planner: which run fits which device, how fast, and what its memory will do.

    from planner import PlanRequest, plan
    answer = plan(PlanRequest(model="llama-3-8b", gpu="rtx-4090"))

Imports no torch; tracing a new block does, later and only then.
"""

from planner.planning import PLANNER_VERSION, plan, timeline
from planner.spec import GpuSpec, Plan, PlanRequest, Timeline

__all__ = ["PLANNER_VERSION", "GpuSpec", "Plan", "PlanRequest", "Timeline", "plan", "timeline"]
