"""Admission: the plan's upper bound against what a device offers. Pure."""

from __future__ import annotations

from chunkplan.engine.spec import JobTraining, ResolvedJobTraining
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


def resolved_training(training: JobTraining, plan: Plan) -> ResolvedJobTraining:
    """The training with a fixed schedule: for ``auto``, the one that the plan chose."""
    return training.resolved(plan.schedule)
