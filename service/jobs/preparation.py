"""Every check of a job request, in the order of their price; what comes out can run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chunkplan.engine.data import check_dataset
from chunkplan.engine.data.rows import FormatChoice
from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import DatasetSpec, JobRequest, ModelPath, ModelRef, ResolvedJobTraining, TrainingSpec, parse
from chunkplan.planner.catalog import find_gpu, find_model
from chunkplan.planner.spec import GpuSpec, Plan, PlanRequest
from chunkplan.service.db import Database
from chunkplan.service.files.paths import Paths
from chunkplan.service.files.repository import FileRepository
from chunkplan.service.jobs.admission import admit, resolved_training
from chunkplan.service.machines.devices import Device, DeviceChoice, choose
from chunkplan.service.plans.repository import PlanRepository
from chunkplan.service.plans.service import PlanService
from chunkplan.service.settings import Settings


@dataclass(frozen=True)
class PreparedJob:
    """A job that was checked, planned and admitted."""

    request: JobRequest
    model: str
    """As it is listed: the catalog id, or the path."""
    model_folder: Path
    dataset_path: Path
    dataset_name: str
    """Name of the file as the user calls it: an upload is stored under its id."""
    num_rows: int
    validation_path: Path | None
    choice: DeviceChoice
    plan: Plan
    training: ResolvedJobTraining


class JobPreparation:
    """Checks, plans and admits job requests; stores nothing but the plan."""

    def __init__(self, database: Database, plans: PlanService, devices: Sequence[Device], settings: Settings) -> None:
        self._database = database
        self._plans = plans
        self._devices = devices
        self._settings = settings
        self._paths = Paths(database, settings)

    def prepare(self, project: str, request: JobRequest) -> PreparedJob:
        """A request that can run.

        Raises:
            InputError: something in it is unknown, missing, malformed or outside the roots.
            DoesNotFit: its plan exceeds the device.
        """
        name, folder = self._model(project, request)
        choice = choose(self._devices, request.gpu)
        dataset = request.dataset
        path, data_name = self._data_file(project, "dataset.", dataset.path, dataset.file_id)
        num_rows = _checked_rows("dataset.", dataset.path, path, dataset.format)
        validation = self._validation(project, dataset)
        plan = self._plan(project, request, folder, choice)
        admit(plan, choice.device.memory_bytes)
        training = resolved_training(request.training, plan)
        return PreparedJob(request, name, folder, path, data_name, num_rows, validation, choice, plan, training)

    def _model(self, project: str, request: JobRequest) -> tuple[str, Path]:
        settings = self._settings
        if isinstance(request.model, ModelPath):
            folder = self._paths.model_folder(project, "model.path", request.model.path)
            name, field = str(folder), "model.path"
        elif isinstance(request.model, str):
            name, field = find_model(request.model).id, "model"
            folder = settings.models_dir / name
            if not (folder / "config.json").is_file():
                raise InputError(
                    field, f"the weights of {name!r} are not in the models folder: put them at {name}/ there"
                )
        else:
            raise InputError("model.config", "a job needs weights: give a catalog id or a path")
        if not any(folder.glob("*.safetensors")):
            raise InputError(field, "the model folder holds no safetensors: other formats are not loaded")
        return name, folder

    def _data_file(self, project: str, prefix: str, given: str | None, file_id: str | None) -> tuple[Path, str]:
        """Where a data file is, and what the user calls it."""
        if given is not None:
            path = self._paths.dataset(project, f"{prefix}path", given)
            return path, path.name
        assert file_id is not None
        with self._database.of(project).read() as session:
            row = FileRepository(session).find(file_id)
        if row is None:
            raise InputError(f"{prefix}file_id", f"there is no file {file_id!r}")
        return self._settings.files_dir / row.stored_name, row.filename

    def _validation(self, project: str, dataset: DatasetSpec) -> Path | None:
        if not dataset.has_validation:
            return None
        prefix, given = "dataset.validation_", dataset.validation_path
        path, _ = self._data_file(project, prefix, given, dataset.validation_file_id)
        _checked_rows(prefix, given, path, dataset.format)
        return path

    def _plan(self, project: str, request: JobRequest, folder: Path, choice: DeviceChoice) -> Plan:
        fields = request.training.model_dump(include=set(TrainingSpec.model_fields))
        training = parse(TrainingSpec, fields)
        if request.plan_id is not None:
            return self._given_plan(project, request.plan_id, folder, choice.gpu, training)
        limit = choice.device.limit_bytes
        asked = PlanRequest(
            model=ModelPath(path=str(folder)), gpu=choice.gpu, memory_limit_bytes=limit, training=training
        )
        return Plan.model_validate(self._plans.plan(project, asked)[0].plan.plan)

    def _given_plan(self, project: str, given: str, folder: Path, gpu: GpuSpec, training: TrainingSpec) -> Plan:
        """The plan that the job names; it is made again if the planner has changed since."""
        with self._database.of(project).read() as session:
            row = PlanRepository(session).find(given)
        if row is None:
            raise InputError("plan_id", f"there is no plan {given!r}")
        planned = PlanRequest.model_validate(row.plan["request"])
        same = {
            "model": self._folder_of(planned.model) == folder,
            "gpu": find_gpu(planned.gpu) == gpu,
            "training": planned.training.model_dump() == training.model_dump(),
        }
        differing = [name for name, is_same in same.items() if not is_same]
        if differing:
            raise InputError("plan_id", f"{given} was made for another {' and '.join(differing)}")
        return Plan.model_validate(self._plans.plan(project, planned)[0].plan.plan)

    def _folder_of(self, model: ModelRef) -> Path | None:
        if isinstance(model, str):
            return self._settings.models_dir / find_model(model).id
        return Path(model.path) if isinstance(model, ModelPath) else None


def _checked_rows(prefix: str, given: str | None, path: Path, format: FormatChoice) -> int:
    """How many rows a data file has, every one of which was checked."""
    try:
        return check_dataset(path, format).num_rows
    except InputError as error:
        raise InputError(f"{prefix}{'file_id' if given is None else 'path'}", error.message) from error
