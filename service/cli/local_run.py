"""A job on this machine: checked, planned, and its run folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from chunkplan import planner
from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import JobRequest, RunSpec
from chunkplan.planner.spec import Plan, PlanRequest
from chunkplan.service.cli.server import settings_with
from chunkplan.service.execution.executors.protocol import Launch
from chunkplan.service.files.paths import resolve_below, resolve_model_folder
from chunkplan.service.jobs.preparation import JobPreparation
from chunkplan.service.machines.devices import local_devices
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
    prepared = JobPreparation(LocalSources(settings), local_devices(settings.devices)).prepare(request)
    device = prepared.choice.device
    folder = (run_dir or settings.data_dir / "runs" / request.name).absolute()
    spec = prepared.run_spec(f"local-{request.name}", lambda prefix: _output_names(folder), device.engine_name)
    if request.output.name is None and (begun := _output_name(folder)) is not None:
        spec = spec.model_copy(update={"output_name": begun})
    number = _attempt_number(folder, spec)
    launch = Launch(attempt_id=f"{spec.job_id}-{number}", run_dir=folder, number=number, device=device.name)
    return LocalRun(folder, spec, prepared.plan, launch, settings.locks_dir)


class LocalSources:
    """The parts of a job on this machine: whatever path the user may read, no uploads, no stored plans."""

    def __init__(self, settings: Settings) -> None:
        self._models_dir = settings.models_dir

    def weights(self, model_id: str) -> Path:
        """The catalog model's folder below ``models/``."""
        folder = self._models_dir / model_id
        if not (folder / "config.json").is_file():
            message = f"the weights of {model_id!r} are not in {folder}: put them there, or give a path"
            raise InputError("model", message)
        return folder

    def model_folder(self, given: str) -> Path:
        """Any folder, under the name by which it is called."""
        resolve_model_folder("model.path", given, _anything)
        return _absolute(given)

    def data_file(self, field: str, given: str) -> Path:
        """Any file, under the name by which it is called."""
        resolve_below(field, given, _anything)
        return _absolute(given)

    def upload(self, field: str, file_id: str) -> tuple[Path, str]:
        """There are none here."""
        raise InputError(field, "uploads belong to a service; give a path")

    def plan(self, request: PlanRequest) -> Plan:
        """A plan made in this process."""
        return planner.plan(request)

    def planned_request(self, plan_id: str) -> PlanRequest:
        """There are none here."""
        raise InputError("plan_id", "plans are kept by a service; leave it out")


def _anything(_path: Path) -> bool:
    return True


def _absolute(given: str) -> Path:
    return Path(given).expanduser().absolute()


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
