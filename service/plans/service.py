"""Plans: looked up by what was asked, computed outside every transaction, stored once."""

from __future__ import annotations

import time

from chunkplan.engine.arithmetic import ceil_div
from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import ModelConfig, ModelPath
from chunkplan.planner.answers.comparison import each_pair
from chunkplan.planner.answers.plan import plan_id
from chunkplan.planner.catalog import find_gpu
from chunkplan.planner.report.formats import Format
from chunkplan.planner.spec import GpuSpec, Plan, PlanRequest, Timeline
from chunkplan.service.db import Database, take_in_turn
from chunkplan.service.db.tables import PlanRow, PlanUseRow
from chunkplan.service.errors import Conflict, Unprocessable
from chunkplan.service.files.paths import Paths
from chunkplan.service.kit.clock import Clock
from chunkplan.service.kit.json_limits import check_json
from chunkplan.service.operation.metrics import Metrics
from chunkplan.service.plans.answers import Answers, PlanAnswer
from chunkplan.service.plans.planning_process import Planner
from chunkplan.service.plans.repository import PlanRepository
from chunkplan.service.plans.schemas import CompareRequest, Comparison, Refusal
from chunkplan.service.settings import Settings


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
        self._paths = Paths(database, settings)
        self._answers = Answers()

    def plan(self, project: str, request: PlanRequest) -> tuple[PlanUseRow, bool]:
        """The plan of a request, and whether it is new to the project.

        Raises:
            InputError: the request names something unknown, outside the roots, or impossible.
        """
        request = self._checked(project, request)
        plan_id = content_id(request)
        with self._database.read() as session:
            plans = PlanRepository(session)
            known, stored = plans.find_use(plan_id, project), plans.find(plan_id)
        if known is not None:
            return known, False
        if stored is None:
            with self._metrics.plan_seconds.time():
                stored = self._row(self._planner.plan(request))
        return self._use(project, stored)

    def known_answer(self, project: str, request: PlanRequest) -> PlanAnswer | None:
        """The answer to a request that the project has made before; raises as :meth:`plan` does. Needs no
        planner.
        """
        plan_id = content_id(self._checked(project, request))
        answer = self._answers.find(project, plan_id)
        if answer is not None:
            return answer
        with self._database.read() as session:
            use = PlanRepository(session).find_use(plan_id, project)
        return None if use is None else self._answers.keep(project, PlanAnswer.of(use))

    def answer(self, project: str, request: PlanRequest) -> tuple[PlanAnswer, bool]:
        """The answer to any request, and whether the plan is new to the project; raises as
        :meth:`plan` does.
        """
        use, is_new = self.plan(project, request)
        return self._answers.keep(project, PlanAnswer.of(use)), is_new

    def _use(self, project: str, row: PlanRow) -> tuple[PlanUseRow, bool]:
        """Stores that a project has asked for a plan, and the plan if nobody else had."""
        with self._database.write() as session:
            take_in_turn(session, row.id)  # the same request may be made by others at the same time
            plans = PlanRepository(session)
            known = plans.find_use(row.id, project)
            if known is not None:
                return known, False
            use = PlanUseRow(project=project, plan=session.merge(row), created_at=self._clock.now())
            plans.add_use(use)
        return use, True

    def compare(self, project: str, request: CompareRequest) -> list[Comparison | Refusal]:
        """A plan or a refusal per device and method, devices outermost; no new plan once one's longest time
        is over.

        Raises:
            InputError: every one is refused; names the first one's field.
        """
        deadline = time.monotonic() + self._settings.plan_timeout_seconds

        def ask(asked: PlanRequest) -> Comparison | Unprocessable:
            if time.monotonic() > deadline:
                return Unprocessable("compare_timeout", "the entries before took all the time; ask for it alone")
            try:
                return Comparison.of(self.plan(project, asked)[0])
            except Unprocessable as error:
                return error

        limit = request.memory_limit_bytes
        answers = each_pair(request.model, request.gpus, request.methods, request.training, limit, ask)
        found = [_comparison(*answer) for answer in answers]
        refused = [answer for _, _, answer in answers if isinstance(answer, InputError)]
        if refused and all(isinstance(each, Refusal) for each in found):
            raise refused[0]
        return found

    def timeline(self, project: str, plan_id: str) -> Timeline:
        """The plan's footprint over one cycle, thinned to its highest points where it is too long.

        Raises:
            NotFound: there is no such plan.
            Conflict: the planner or the model has changed since, so that a timeline would contradict the
                plan.
        """
        timeline = self._planner.timeline(self._current(project, plan_id).request)
        return thin(timeline, self._settings.max_timeline_points)

    def export(self, project: str, plan_id: str, form: Format, chunk_index: int | None) -> bytes:
        """The plan's footprint as a file; raises as :meth:`timeline` does.

        Raises:
            InputError: the plan has no such chunk, or the format is of all chunks.
        """
        return self._planner.export(self._current(project, plan_id), form, chunk_index)

    def _current(self, project: str, plan_id: str) -> Plan:
        """A stored plan that this planner would make again."""
        with self._database.of(project).read() as session:
            plan = Plan.model_validate(PlanRepository(session).get(plan_id).plan)
        if content_id(plan.request) != plan.id:
            message = "another planner version made this plan, or its model has changed; plan the request again"
            raise Conflict("planner_changed", message)
        return plan

    def _checked(self, project: str, request: PlanRequest) -> PlanRequest:
        if isinstance(request.model, ModelConfig):
            check_json("model.config", request.model.config)
        if isinstance(request.gpu, GpuSpec):
            check_json("gpu", request.gpu.model_dump())
        if isinstance(request.model, ModelPath):
            folder = self._paths.model_folder(project, "model.path", request.model.path)
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


def _comparison(gpu: str, method: str, answer: Comparison | Unprocessable | InputError) -> Comparison | Refusal:
    if isinstance(answer, InputError):
        return Refusal.of(gpu, method, "invalid_input", answer.message, answer.field)
    if isinstance(answer, Unprocessable):
        return Refusal.of(gpu, method, answer.code, str(answer))
    return answer


def thin(timeline: Timeline, max_points: int) -> Timeline:
    """At most ``max_points`` points: of every group of neighbours, the highest one."""
    stride = ceil_div(len(timeline.points), max_points)
    if stride <= 1:
        return timeline
    groups = [timeline.points[i : i + stride] for i in range(0, len(timeline.points), stride)]
    return timeline.model_copy(
        update={"points": [max(group, key=lambda point: point.allocated_bytes) for group in groups]}
    )


def content_id(request: PlanRequest) -> str:
    """The id that the plan of a request has: of the request, what its names stand for, and the planner
    itself.
    """
    return plan_id(request)
