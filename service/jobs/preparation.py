"""Every check of a job request, in the order of their price; what comes out can run once it is admitted.

One definition for the service and for ``chunkplan train``, which differ in where things come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from chunkplan.engine.data import check_dataset
from chunkplan.engine.data.rows import FormatChoice
from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import (
    DatasetSpec,
    JobRequest,
    ModelPath,
    ModelRef,
    ResolvedJobTraining,
    RunSpec,
    TrainingSpec,
    parse,
)
from chunkplan.planner.catalog import find_gpu, find_model
from chunkplan.planner.spec import GpuSpec, Plan, PlanRequest
from chunkplan.service.jobs.run_spec import run_spec
from chunkplan.service.machines.devices import Device, DeviceChoice, choose


class Sources(Protocol):
    """Where the parts of a job come from. Every method raises InputError for what is not there."""

    def weights(self, model_id: str) -> Path:
        """The folder with the weights of a catalog model."""

    def model_folder(self, given: str) -> Path:
        """The folder that a request names as ``model.path``."""

    def data_file(self, field: str, given: str) -> Path:
        """The file that a request names."""

    def upload(self, field: str, file_id: str) -> tuple[Path, str]:
        """An uploaded file, and what the user calls it."""

    def plan(self, request: PlanRequest) -> Plan:
        """The answer to a plan request."""

    def planned_request(self, plan_id: str) -> PlanRequest:
        """What an earlier plan was asked for."""


@dataclass(frozen=True)
class PreparedJob:
    """A job that was checked and planned."""

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
    """With a fixed schedule: for ``auto``, the one that the plan chose."""

    def run_spec(self, job_id: str, taken: Callable[[str], Iterable[str]], device: str = "cpu") -> RunSpec:
        """What the engine runs; see :func:`chunkplan.service.jobs.run_spec.run_spec`."""
        return run_spec(
            self.request,
            self.plan,
            self.training,
            job_id=job_id,
            model_folder=self.model_folder,
            dataset_path=self.dataset_path,
            dataset_name=self.dataset_name,
            validation_path=self.validation_path,
            taken=taken,
            device=device,
        )


class JobPreparation:
    """Checks and plans job requests; stores nothing.

    Args:
        sources: where models, data and plans come from.
        devices: of this machine.
    """

    def __init__(self, sources: Sources, devices: Sequence[Device]) -> None:
        self._sources = sources
        self._devices = devices

    def prepare(self, request: JobRequest) -> PreparedJob:
        """A request that can run once it is admitted.

        Raises:
            InputError: something in it is unknown, missing, malformed or not to be read.
        """
        model, folder = self._model(request.model)
        choice = choose(self._devices, request.gpu)
        dataset = request.dataset
        path, data_name, num_rows = self._rows("dataset.", dataset.path, dataset.file_id, dataset.format)
        validation = self._validation(dataset)
        plan = self._plan(request, folder, choice)
        training = request.training.resolved(plan.schedule)
        return PreparedJob(request, model, folder, path, data_name, num_rows, validation, choice, plan, training)

    def _model(self, model: ModelRef) -> tuple[str, Path]:
        if isinstance(model, ModelPath):
            folder = self._sources.model_folder(model.path)
            name, field = str(folder), "model.path"
        elif isinstance(model, str):
            name, field = find_model(model).id, "model"
            folder = self._sources.weights(name)
        else:
            raise InputError("model.config", "a job needs weights: give a catalog id or a path")
        if not any(folder.glob("*.safetensors")):
            raise InputError(field, "the model folder holds no safetensors: other formats are not loaded")
        return name, folder

    def _rows(self, prefix: str, given: str | None, file_id: str | None, format: FormatChoice) -> tuple[Path, str, int]:
        """Where a data file is, what the user calls it, and how many rows it has, each of them checked."""
        if given is not None:
            field = f"{prefix}path"
            path = self._sources.data_file(field, given)
            name = path.name
        else:
            assert file_id is not None
            field = f"{prefix}file_id"
            path, name = self._sources.upload(field, file_id)
        try:
            return path, name, check_dataset(path, format).num_rows
        except InputError as error:
            raise InputError(field, error.message) from error

    def _validation(self, dataset: DatasetSpec) -> Path | None:
        if not dataset.has_validation:
            return None
        prefix, file_id = "dataset.validation_", dataset.validation_file_id
        return self._rows(prefix, dataset.validation_path, file_id, dataset.format)[0]

    def _plan(self, request: JobRequest, folder: Path, choice: DeviceChoice) -> Plan:
        fields = request.training.model_dump(include=set(TrainingSpec.model_fields))
        training = parse(TrainingSpec, fields)
        if request.plan_id is not None:
            return self._given_plan(request.plan_id, folder, choice.gpu, training)
        limit = choice.device.limit_bytes
        return self._sources.plan(
            PlanRequest(model=ModelPath(path=str(folder)), gpu=choice.gpu, memory_limit_bytes=limit, training=training)
        )

    def _given_plan(self, given: str, folder: Path, gpu: GpuSpec, training: TrainingSpec) -> Plan:
        """The plan that the job names; it is made again if the planner has changed since."""
        planned = self._sources.planned_request(given)
        same = {
            "model": self._folder_of(planned.model) == folder,
            "gpu": find_gpu(planned.gpu) == gpu,
            "training": planned.training.model_dump() == training.model_dump(),
        }
        differing = [name for name, is_same in same.items() if not is_same]
        if differing:
            raise InputError("plan_id", f"{given} was made for another {' and '.join(differing)}")
        return self._sources.plan(planned)

    def _folder_of(self, model: ModelRef) -> Path | None:
        """Where the weights of a planned model are; None where it was planned without any."""
        if isinstance(model, str):
            try:
                return self._sources.weights(find_model(model).id)
            except InputError:
                return None
        return Path(model.path) if isinstance(model, ModelPath) else None
