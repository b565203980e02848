"""Plans: looked up by what was asked, computed outside every transaction, stored once."""

from __future__ import annotations

from collections.abc import Iterator

from engine.spec import ModelConfig, ModelPath, TrainingSpec, parse
from planner.catalog import find_gpu
from planner.exports import Format
from planner.planning import Planner as Planning
from planner.planning import plan_id
from planner.spec import GpuSpec, Plan, PlanRequest, Timeline
from service.bounded import check_json
from service.clock import Clock
from service.db import Database
from service.db.tables import PlanRow
from service.errors import Conflict
from service.operation.metrics import Metrics
from service.plans.repository import PlanRepository
from service.plans.schemas import CompareRequest
from service.plans.worker import Planner
from service.roots import resolve_model_folder
from service.settings import Settings


class PlanService:
    """Makes, finds and explains plans."""

    def __init__(
        self, database: Database, planner: Planner, settings: Settings, clock: Clock, metrics: Metrics
    ) -> None:
        self._database = database
        self._planner = planner
        self._settings = settings
        self._clock = clock
        self._metrics = metrics

    def plan(self, request: PlanRequest) -> tuple[PlanRow, bool]:
        """The plan of a request, and whether it is new.

        Raises:
            InputError: the request names something unknown, outside the roots, or impossible.
        """
        request = self._checked(request)
        with self._database.read() as session:
            known = PlanRepository(session).find(_content_id(request))
        if known is not None:
            return known, False
        with self._metrics.plan_seconds.time():
            plan = self._planner.plan(request)
        with self._database.write() as session:
            plans = PlanRepository(session)
            known = plans.find(plan.id)
            return (known, False) if known is not None else (plans.add(self._row(plan)), True)

    def compare(self, request: CompareRequest) -> list[PlanRow]:
        """One plan per device and method, devices outermost."""
        return [self.plan(single)[0] for single in _single_requests(request)]

    def timeline(self, plan_id: str) -> Timeline:
        """The plan's footprint over one cycle, thinned to its highest points where it is too long.

        Raises:
            NotFound: there is no such plan.
            Conflict: the planner or the model has changed since, so that a timeline would contradict the plan.
        """
        timeline = self._planner.timeline(self._current(plan_id).request)
        return thin(timeline, self._settings.max_timeline_points)

    def export(self, plan_id: str, form: Format, chunk_index: int | None) -> bytes:
        """The plan's footprint as a file; raises as :meth:`timeline` does.

        Raises:
            InputError: the plan has no such chunk, or the format is of all chunks.
        """
        return self._planner.export(self._current(plan_id), form, chunk_index)

    def _current(self, plan_id: str) -> Plan:
        """A stored plan that this planner would make again."""
        with self._database.read() as session:
            plan = Plan.model_validate(PlanRepository(session).get(plan_id).plan)
        if _content_id(plan.request) != plan.id:
            message = "another planner version made this plan, or its model has changed; plan the request again"
            raise Conflict("planner_changed", message)
        return plan

    def _checked(self, request: PlanRequest) -> PlanRequest:
        if isinstance(request.model, ModelConfig):
            check_json("model.config", request.model.config)
        if isinstance(request.gpu, GpuSpec):
            check_json("gpu", request.gpu.model_dump())
        if isinstance(request.model, ModelPath):
            roots = [*self._settings.model_roots, self._settings.models_dir]
            folder = resolve_model_folder("model.path", request.model.path, roots)
            request = request.model_copy(update={"model": ModelPath(path=str(folder))})
        return request

    def _row(self, plan: Plan) -> PlanRow:
        return PlanRow(
            id=plan.id,
            planner_version=plan.planner_version,
            model=plan.model.name,
            gpu=find_gpu(plan.request.gpu).name,
            method=plan.request.training.method,
            fits=plan.fits,
            upper_bytes=plan.peak.upper_bytes,
            capacity_bytes=plan.capacity_bytes,
            step_seconds=plan.step_seconds,
            plan=plan.model_dump(mode="json"),
            created_at=self._clock.now(),
        )


def thin(timeline: Timeline, max_points: int) -> Timeline:
    """At most ``max_points`` points: of every group of neighbours, the highest one."""
    stride = -(-len(timeline.points) // max_points)
    if stride <= 1:
        return timeline
    groups = [timeline.points[i : i + stride] for i in range(0, len(timeline.points), stride)]
    return timeline.model_copy(
        update={"points": [max(group, key=lambda point: point.allocated_bytes) for group in groups]}
    )


def _content_id(request: PlanRequest) -> str:
    """The id that the plan of a request has: of the request, what its names stand for, and the planner itself."""
    return plan_id(request, Planning(request))


def _single_requests(request: CompareRequest) -> Iterator[PlanRequest]:
    for gpu in request.gpus:
        for method in request.methods:
            values = request.training.model_dump() | {"method": method}
            if method != "chunkft":
                values["schedule"] = {"num_chunks": 1}
            if method != "lora":
                values["lora"] = None
            training = parse(TrainingSpec, values)
            yield PlanRequest(
                model=request.model, gpu=gpu, memory_limit_bytes=request.memory_limit_bytes, training=training
            )
