"""Whether a job may run, and whose turn it is. Pure.

A job is admitted if its plan's upper bound is within what a device offers.

Jobs age: a point of priority is worth as much as a fixed time of waiting. As all wait equally fast, the order
of two jobs never changes while they wait, and is that of a time which is known when a job is submitted: whose
is earliest is next. A database finds it with an index, however long the queue is, and no job waits for ever.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from chunkplan.planner.spec import Plan
from chunkplan.service.errors import DoesNotFit


def shortfall_bytes(upper_bytes: int, memory_bytes: int) -> int:
    """By how much a bound exceeds a device; 0 when it fits."""
    return max(0, upper_bytes - memory_bytes)


def admit(plan: Plan, memory_bytes: int) -> None:
    """Let a plan pass, or not.

    Args:
        plan: the job's.
        memory_bytes: of the device that it would run on.

    Raises:
        DoesNotFit: names the alternatives that do fit.
    """
    available = min(plan.capacity_bytes, memory_bytes)
    missing = shortfall_bytes(plan.peak.upper_bytes, available)
    if missing == 0:
        return
    advice = "; ".join(alternative.why for alternative in plan.alternatives)
    detail = f"the plan needs up to {plan.peak.upper_bytes} bytes, {missing} more than there are"
    raise DoesNotFit(
        f"{detail}; {advice}" if advice else detail,
        predicted_bytes=plan.peak.upper_bytes,
        available_bytes=available,
        alternatives=[alternative.model_dump(mode="json") for alternative in plan.alternatives],
        plan_id=plan.id,
    )


def turn_at(created_at: datetime, priority: int, point_seconds: float) -> datetime:
    """When a job without a priority would have come to have the same turn.

    Args:
        created_at: when the job came.
        priority: the higher, the earlier its turn.
        point_seconds: what a point of priority is worth.
    """
    return created_at - timedelta(seconds=priority * point_seconds)
