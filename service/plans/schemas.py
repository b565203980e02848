"""What plan routes take and give, beside `chunkplan.planner.spec`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from chunkplan.engine.spec import ModelRef, SpecModel, TrainingSpec
from chunkplan.planner.spec import GpuRef
from chunkplan.service.db.tables import PlanUseRow
from chunkplan.service.kit.paging import Listed


class PerfettoTrace(BaseModel):
    """The footprint in Chrome's trace event format."""

    traceEvents: list[dict[str, Any]]  # noqa: N815 - the format's own names
    displayTimeUnit: Literal["ms"]  # noqa: N815
    otherData: dict[str, str]  # noqa: N815


class PlanSummary(Listed):
    """A plan in a list."""

    id: str
    object: Literal["plan"] = "plan"
    planner_version: str
    model: str
    gpu: str
    method: str
    fits: bool
    upper_bytes: int
    capacity_bytes: int
    step_seconds: float
    created_at: datetime

    @classmethod
    def of(cls, use: PlanUseRow) -> PlanSummary:
        """The summary of a plan that a project has asked for."""
        return cls.from_row(use.plan, created_at=use.created_at)


class CompareRequest(SpecModel):
    """One model, several devices, several methods."""

    model: ModelRef
    gpus: Annotated[list[GpuRef], Field(min_length=1, max_length=16)]
    methods: Annotated[list[Literal["chunkft", "full", "lora"]], Field(min_length=1, max_length=3)] = Field(
        default=["chunkft", "full"]
    )
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    """For every method; a method of one chunk takes everything but the schedule."""
    memory_limit_bytes: Annotated[int, Field(gt=0, le=2**50)] | None = None


class Comparison(PlanSummary):
    """One cell of a comparison: a plan's summary with its figures."""

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int
    host_bytes: int
    tokens_per_second: float

    @classmethod
    def of(cls, use: PlanUseRow) -> Comparison:
        """The cell of a plan."""
        plan = use.plan.plan
        peak = plan["peak"]
        figures = {name: peak[name] for name in ("allocated_bytes", "reserved_bytes", "device_bytes", "host_bytes")}
        return cls(**PlanSummary.of(use).model_dump(), **figures, tokens_per_second=plan["tokens_per_second"])


class Refusal(Listed):
    """One cell of a comparison that has no plan, and why; ``id`` is unique in the answer only."""

    object: Literal["refusal"] = "refusal"
    gpu: str
    method: str
    code: str
    field: str | None
    detail: str

    @classmethod
    def of(cls, gpu: str, method: str, code: str, detail: str, field: str | None = None) -> Refusal:
        """The cell of a device and method."""
        return cls(id=f"{gpu}:{method}", gpu=gpu, method=method, code=code, field=field, detail=detail)
