"""From a checked request to what the engine runs: one definition for the service and ``chunkplan train``.
Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from chunkplan.engine.data.readers import is_running_text
from chunkplan.engine.export.names import output_name, output_prefix
from chunkplan.engine.spec import JobRequest, ResolvedJobTraining, RunSpec
from chunkplan.engine.stream.schedule import expected_updates, few_updates_warning
from chunkplan.planner.catalog import find_model
from chunkplan.planner.spec import Plan


def run_spec(
    request: JobRequest,
    plan: Plan,
    training: ResolvedJobTraining,
    *,
    job_id: str,
    model_folder: Path,
    dataset_path: Path,
    dataset_name: str,
    taken: Callable[[str], Iterable[str]],
    validation_path: Path | None = None,
    device: str = "cpu",
) -> RunSpec:
    """The resolved job.

    Args:
        request: what was asked.
        plan: the job's.
        training: with a fixed schedule.
        job_id: its id.
        model_folder: where the weights are.
        dataset_path: where the data is.
        dataset_name: how the user calls the data file.
        taken: names of outputs that begin with a prefix, for the number of a default name.
        validation_path: where the data to evaluate on is, if it has a file of its own.
        device: ``cpu`` or ``cuda:N``.
    """
    model_name = base_name(request) or model_folder.name
    name = request.output.name
    if name is None:
        size, suffix = plan.model.num_base_parameters, request.output.suffix
        prefix = output_prefix(model_name, size, training.method, dataset_name, suffix)
        name = output_name(prefix, taken(prefix))
    return RunSpec(
        job_id=job_id,
        name=request.name,
        model_path=str(model_folder),
        model_name=model_name,
        dataset_path=str(dataset_path),
        dataset_name=dataset_name,
        dataset_format=request.dataset.format,
        eval_fraction=request.dataset.held_out_fraction,
        validation_path=None if validation_path is None else str(validation_path),
        training=training,
        output_name=name,
        merge=request.output.merge,
        predicted_peak_bytes=plan.peak.allocated_bytes,
        device=device,
    )


def base_name(request: JobRequest) -> str | None:
    """The base model's name on the Hugging Face Hub; None for a folder, which has none but its own."""
    return find_model(request.model).hf_name if isinstance(request.model, str) else None


def settings_warnings(training: ResolvedJobTraining, dataset: Path, num_rows: int, eval_fraction: float) -> list[str]:
    """What a user should know of the settings before a job runs, as far as its length is known.

    How many sequences a text or packed rows make is known when they are tokenized; the run itself warns then.
    """
    if training.max_steps is None and (training.packing or is_running_text(dataset)):
        return []
    num_batches = max(1, int(num_rows * (1 - eval_fraction)) // training.micro_batch_size)
    warning = few_updates_warning(training.schedule, expected_updates(training, num_batches))
    return [] if warning is None else [warning]
