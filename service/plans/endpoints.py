"""Routes of plans."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from chunkplan.planner.report.formats import Format
from chunkplan.planner.spec import Plan, PlanRequest, Timeline
from chunkplan.service.http.dependencies import CallerDep, PlanTurn, ReadSession, ServerDep, part, plan_turn
from chunkplan.service.http.examples import COMPARISON, PLAN
from chunkplan.service.kit.paging import OptionalText, Page, WindowDep
from chunkplan.service.plans.repository import PlanRepository
from chunkplan.service.plans.schemas import CompareRequest, Comparison, PerfettoTrace, PlanSummary, Refusal
from chunkplan.service.plans.service import PlanService

router = APIRouter(prefix="/v1/plans", tags=["plans"])
PlansDep = Annotated[PlanService, part("plans")]

_FILE_TYPES: dict[Format, tuple[str, str]] = {
    "json": ("application/json", ".json"),
    "perfetto": ("application/json", ".perfetto.json"),
    "memory_snapshot": ("application/octet-stream", ".pickle"),
    "svg": ("image/svg+xml", ".svg"),
    "png": ("image/png", ".png"),
}
"""Media type and the end of the file's name."""
_FILES: dict[str, Any] = {media_type: {} for media_type, _ in _FILE_TYPES.values()}


@router.post("", response_model=Plan, status_code=201, responses={200: {"model": Plan}})
async def create_plan(
    request: Annotated[PlanRequest, Body(examples=[PLAN])], plans: PlansDep, server: ServerDep, caller: CallerDep
) -> Response:
    """Plan a run without running it: 201 with the plan, 200 when the same request was planned before."""
    is_new = False
    answer = await run_in_threadpool(plans.known_answer, caller.project, request)  # what is known waits for no turn
    if answer is None:
        async with plan_turn(server, caller):
            answer, is_new = await run_in_threadpool(plans.answer, caller.project, request)
    assert answer is not None
    headers = {"Location": f"/v1/plans/{answer.plan_id}", "ETag": f'"{answer.plan_id}"'}
    return Response(answer.body, 201 if is_new else 200, headers, media_type="application/json")


@router.get("")
def list_plans(
    session: ReadSession, window: WindowDep, model: OptionalText = None, gpu: OptionalText = None
) -> Page[PlanSummary]:
    """Stored plans, newest first."""
    uses, has_more = PlanRepository(session).page(window, model=model, gpu=gpu)
    return Page.of([PlanSummary.of(use) for use in uses], has_more=has_more)


@router.post("/compare", dependencies=[PlanTurn])
def compare_plans(
    request: Annotated[CompareRequest, Body(examples=[COMPARISON])], plans: PlansDep, caller: CallerDep
) -> Page[Comparison | Refusal]:
    """One model against several devices and methods: for each pair a plan, or an entry that says why there is
    none.
    """
    return Page.of(plans.compare(caller.project, request))


@router.get("/{plan_id}", response_model=Plan, responses={304: {"description": "Unchanged"}})
def show_plan(plan_id: str, session: ReadSession, if_none_match: Annotated[str | None, Header()] = None) -> Response:
    """One plan. Plans never change: the ETag is the id."""
    row = PlanRepository(session).get(plan_id)
    headers = {"ETag": f'"{row.id}"', "Cache-Control": "private, max-age=31536000, immutable"}
    if if_none_match is not None and f'"{row.id}"' in if_none_match:
        return Response(status_code=304, headers=headers)
    return JSONResponse(row.plan, headers=headers)


@router.get(
    "/{plan_id}/timeline",
    response_model=Timeline | PerfettoTrace,
    responses={200: {"content": _FILES}, 409: {}},
    dependencies=[PlanTurn],
)
def show_timeline(
    plan_id: str,
    plans: PlansDep,
    caller: CallerDep,
    form: Annotated[Format, Query(alias="format")] = "json",
    chunk: Annotated[int | None, Query(ge=0)] = None,
) -> Any:
    """The footprint over one cycle: live bytes by category, layer by layer.

    `format`: `json`; `perfetto`, a trace for ui.perfetto.dev and chrome://tracing; `memory_snapshot`, for
    pytorch.org/memory_viz the allocations of one `chunk` (default: that with the peak); `svg` and `png`, the
    picture.
    """
    if form == "json" and chunk is None:
        return plans.timeline(caller.project, plan_id)
    media_type, suffix = _FILE_TYPES[form]
    content = plans.export(caller.project, plan_id, form, chunk)
    disposition = "inline" if form in ("svg", "png") else "attachment"
    headers = {"Content-Disposition": f'{disposition}; filename="{plan_id}{suffix}"'}
    return Response(content, media_type=media_type, headers=headers)
