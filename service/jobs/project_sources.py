"""The parts of a project's jobs: paths below the roots, the project's uploads, the plans it has made."""

from __future__ import annotations

from pathlib import Path

from chunkplan.engine.errors import InputError
from chunkplan.planner.spec import Plan, PlanRequest
from chunkplan.service.db import Database
from chunkplan.service.files.paths import Paths
from chunkplan.service.files.repository import FileRepository
from chunkplan.service.plans.repository import PlanRepository
from chunkplan.service.plans.service import PlanService
from chunkplan.service.settings import Settings


class ProjectSources:
    """The :class:`chunkplan.service.jobs.preparation.Sources` of one project."""

    def __init__(self, project: str, database: Database, plans: PlanService, settings: Settings) -> None:
        self._project = project
        self._database = database
        self._plans = plans
        self._settings = settings
        self._paths = Paths(database, settings)

    def weights(self, model_id: str) -> Path:
        """The catalog model's folder below the service's models."""
        folder = self._settings.models_dir / model_id
        if not (folder / "config.json").is_file():
            message = f"the weights of {model_id!r} are not in the models folder: put them at {model_id}/ there"
            raise InputError("model", message)
        return folder

    def model_folder(self, given: str) -> Path:
        """The real path of a model folder that the project may read."""
        return self._paths.model_folder(self._project, "model.path", given)

    def data_file(self, field: str, given: str) -> Path:
        """The real path of a data file that the project may read."""
        return self._paths.dataset(self._project, field, given)

    def upload(self, field: str, file_id: str) -> tuple[Path, str]:
        """A file that the project has uploaded, and its name there."""
        with self._database.of(self._project).read() as session:
            row = FileRepository(session).find(file_id)
        if row is None:
            raise InputError(field, f"there is no file {file_id!r}")
        return self._settings.files_dir / row.stored_name, row.filename

    def plan(self, request: PlanRequest) -> Plan:
        """The plan of a request, which is stored."""
        return Plan.model_validate(self._plans.plan(self._project, request)[0].plan.plan)

    def planned_request(self, plan_id: str) -> PlanRequest:
        """The request of a plan that the project has made."""
        with self._database.of(self._project).read() as session:
            row = PlanRepository(session).find(plan_id)
        if row is None:
            raise InputError("plan_id", f"there is no plan {plan_id!r}")
        return PlanRequest.model_validate(row.plan["request"])
