"""Routes of plans."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header
from starlette.responses import JSONResponse, Response

from planner.spec import Plan, PlanRequest, Timeline
from service.dependencies import PlansDep, ReadSession
from service.paging import OptionalText, Page, WindowDep
from service.plans.repository import PlanRepository
from service.plans.schemas import CompareRequest, Comparison, PlanSummary

router = APIRouter(prefix="/v1/plans", tags=["plans"])


@router.post("", response_model=Plan, status_code=201, responses={200: {"model": Plan}})
def create_plan(request: PlanRequest, plans: PlansDep) -> Response:
    """Plan a run without running it: 201 with the plan, 200 when the same request was planned before."""
    row, is_new = plans.plan(request)
    headers = {"Location": f"/v1/plans/{row.id}", "ETag": f'"{row.id}"'}
    return JSONResponse(row.plan, status_code=201 if is_new else 200, headers=headers)


@router.get("")
def list_plans(
    session: ReadSession, window: WindowDep, model: OptionalText = None, gpu: OptionalText = None
) -> Page[PlanSummary]:
    """Stored plans, newest first."""
    rows, has_more = PlanRepository(session).page(window, model=model, gpu=gpu)
    return Page.of([PlanSummary.of(row) for row in rows], has_more=has_more)


@router.post("/compare")
def compare_plans(request: CompareRequest, plans: PlansDep) -> Page[Comparison]:
    """One model against several devices and methods: a plan for each pair."""
    return Page.of([Comparison.of(row) for row in plans.compare(request)])


@router.get("/{plan_id}", response_model=Plan)
def show_plan(plan_id: str, session: ReadSession, if_none_match: Annotated[str | None, Header()] = None) -> Response:
    """One plan. Plans never change: the ETag is the id."""
    row = PlanRepository(session).get(plan_id)
    headers = {"ETag": f'"{row.id}"', "Cache-Control": "private, max-age=31536000, immutable"}
    if if_none_match is not None and f'"{row.id}"' in if_none_match:
        return Response(status_code=304, headers=headers)
    return JSONResponse(row.plan, headers=headers)


@router.get("/{plan_id}/timeline")
def show_timeline(plan_id: str, plans: PlansDep) -> Timeline:
    """The footprint over one cycle: live bytes by category, layer by layer."""
    return plans.timeline(plan_id)
