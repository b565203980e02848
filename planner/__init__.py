"""chunkplan's planner: which run fits which device, how fast, and what its memory will do.

    from planner import PlanRequest, plan
    answer = plan(PlanRequest(model="llama-3-8b", gpu="rtx-4090"))

Imports no torch; tracing a new block does, later and only then.
"""

from chunkplan.planner.answers.plan import plan
from chunkplan.planner.answers.timeline import timeline
from chunkplan.planner.spec import GpuSpec, Plan, PlanRequest, Timeline

__all__ = ["GpuSpec", "Plan", "PlanRequest", "Timeline", "plan", "timeline"]
