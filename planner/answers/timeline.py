"""``timeline``: a plan's footprint over time."""

from __future__ import annotations

from chunkplan.engine.stream.chunks import Chunk
from chunkplan.engine.stream.schedule import Schedule
from chunkplan.planner.answers.plan import plan_id
from chunkplan.planner.footprint.footprint import Moment
from chunkplan.planner.search.choose import choose
from chunkplan.planner.search.evaluator import Evaluator
from chunkplan.planner.spec import Breakdown, PlanRequest, Timeline, TimelinePoint


def timeline(request: PlanRequest) -> Timeline:
    """The footprint over one cycle in the schedule's order: the highest moment of every segment of every
    step.
    """
    evaluator = Evaluator(request)
    chosen = choose(evaluator)
    workspaces = evaluator.overheads.workspace_bytes * evaluator.overheads.num_workspaces
    points: list[TimelinePoint] = []
    begin = 0.0
    for index in Schedule(len(chosen.chunks), chosen.schedule.order, 1).cycle_order(0):
        footprint = chosen.chunks[index]
        moments = evaluator.footprints(chosen.training).moments(footprint.chunk, chosen.schedule)
        points.extend(_point(footprint.chunk, moment, begin, workspaces) for moment in moments)
        begin += footprint.seconds
    return Timeline(plan_id=plan_id(request, evaluator), capacity_bytes=evaluator.capacity_bytes, points=points)


def _point(chunk: Chunk, moment: Moment, begin: float, workspaces: int) -> TimelinePoint:
    categories = moment.live.as_dict()
    categories["workspace"] += workspaces
    breakdown = Breakdown(**categories)
    return TimelinePoint(
        chunk_index=chunk.index,
        phase=moment.phase,
        segment=moment.segment,
        seconds=begin + moment.seconds,
        allocated_bytes=breakdown.total_bytes,
        breakdown=breakdown,
    )
