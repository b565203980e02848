"""A job on this machine: checked, planned, and its run folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from chunkplan import planner
from chunkplan.engine.data import check_dataset
from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import DatasetSpec, JobRequest, ModelPath, RunSpec, TrainingSpec, parse
from chunkplan.planner.catalog import find_model
from chunkplan.planner.spec import Plan, PlanRequest
from chunkplan.service.cli.server import settings_with
from chunkplan.service.execution.executors.protocol import Launch
from chunkplan.service.jobs.admission import resolved_training
from chunkplan.service.jobs.run_spec import run_spec
from chunkplan.service.machines.devices import choose, local_devices
from chunkplan.service.settings import Settings


@dataclass(frozen=True)
class LocalRun:
    """What one attempt needs."""

    folder: Path
    spec: RunSpec
    plan: Plan
    launch: Launch
    locks_dir: Path

    @property
    def events_file(self) -> Path:
        """Where the attempt reports."""
        return self.folder / "attempts" / str(self.launch.number) / "events.jsonl"

    @property
    def log_file(self) -> Path:
        """What the attempt's process printed."""
        return self.events_file.with_name("log.txt")

    def write(self) -> None:
        """Put the job where the worker looks for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "job.json").write_text(self.spec.model_dump_json(indent=1), encoding="utf-8")


def prepare(request: JobRequest, run_dir: Path | None, data_dir: Path | None) -> LocalRun:
    """Check and plan a job.

    Args:
        request: the job.
        run_dir: where it runs; a folder of the same job that was stopped is resumed.
        data_dir: holds ``models/``, ``runs/`` and ``locks/``.

    Raises:
        InputError: something in it cannot be used; names the field.
    """
    settings = settings_with(data_dir=data_dir)
    model_folder = _model_folder(request, settings)
    choice = choose(local_devices(settings.devices), request.gpu)
    device = choice.device
    dataset, validation = _datasets(request.dataset)
    training = parse(TrainingSpec, request.training.model_dump(include=set(TrainingSpec.model_fields)))
    plan = planner.plan(
        PlanRequest(
            model=ModelPath(path=str(model_folder)),
            gpu=choice.gpu,
            memory_limit_bytes=device.limit_bytes,
            training=training,
        )
    )
    folder = (run_dir or settings.data_dir / "runs" / request.name).absolute()
    spec = run_spec(
        request,
        plan,
        resolved_training(request.training, plan),
        job_id=f"local-{request.name}",
        model_folder=model_folder,
        dataset_path=dataset,
        dataset_name=dataset.name,
        validation_path=validation,
        taken=lambda prefix: _output_names(folder),
        device=device.engine_name,
    )
    if request.output.name is None and (begun := _output_name(folder)) is not None:
        spec = spec.model_copy(update={"output_name": begun})
    number = _attempt_number(folder, spec)
    launch = Launch(attempt_id=f"{spec.job_id}-{number}", run_dir=folder, number=number, device=device.name)
    return LocalRun(folder, spec, plan, launch, settings.locks_dir)


def _model_folder(request: JobRequest, settings: Settings) -> Path:
    if isinstance(request.model, ModelPath):
        return Path(request.model.path).expanduser().absolute()
    if not isinstance(request.model, str):
        raise InputError("model.config", "a job needs weights: give a catalog id or a path")
    name = find_model(request.model).id
    folder = settings.models_dir / name
    if not (folder / "config.json").is_file():
        raise InputError("model", f"the weights of {name!r} are not in {folder}: put them there, or give a path")
    return folder


def _datasets(given: DatasetSpec) -> tuple[Path, Path | None]:
    """The checked files to train and to evaluate on."""
    if given.path is None:
        raise InputError("dataset.file_id", "uploads belong to a service; give a path")
    if given.validation_file_id is not None:
        raise InputError("dataset.validation_file_id", "uploads belong to a service; give a path")
    path = Path(given.path).expanduser().absolute()
    check_dataset(path, given.format)
    if given.validation_path is None:
        return path, None
    validation = Path(given.validation_path).expanduser().absolute()
    try:
        check_dataset(validation, given.format)
    except InputError as error:
        raise InputError("dataset.validation_path", error.message) from error
    return path, validation


def _attempt_number(folder: Path, spec: RunSpec) -> int:
    """1 in a new folder; the next one where the same job was stopped."""
    job_file = folder / "job.json"
    if not job_file.exists():
        return 1
    try:
        begun = RunSpec.model_validate_json(job_file.read_text(encoding="utf-8"))
        # The job is the same whatever today's plan of it says: that depends on the planner's version and on
        # threads.
        is_same = begun.model_copy(update={"predicted_peak_bytes": spec.predicted_peak_bytes}) == spec
    except ValueError:
        is_same = False
    if not is_same:
        raise InputError("run_dir", f"{folder} holds another job; give another --run-dir")
    numbers = [int(path.name) for path in (folder / "attempts").glob("*") if path.name.isdigit()]
    if any(_is_finished(folder / "attempts" / str(number) / "events.jsonl") for number in numbers):
        raise InputError("run_dir", f"this job has finished in {folder}; give another --run-dir to train it again")
    return max(numbers, default=0) + 1


def _output_names(folder: Path) -> list[str]:
    """What the runs beside this one export."""
    names = [_output_name(job_file.parent) for job_file in folder.parent.glob("*/job.json")]
    return [name for name in names if name is not None]


def _output_name(folder: Path) -> str | None:
    """What the run of a folder exports; None where there is no run."""
    try:
        return RunSpec.model_validate_json((folder / "job.json").read_text(encoding="utf-8")).output_name
    except (OSError, ValueError):
        return None


def _is_finished(events_file: Path) -> bool:
    try:
        lines = events_file.read_text(encoding="utf-8").splitlines()
        last = json.loads(lines[-1]) if lines else {}
    except (OSError, ValueError):
        return False
    return bool(last.get("type") == "finished" and last.get("reason") == "completed")
