"""Which models fit a device, and which devices hold a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import TrainingSpec
from chunkplan.planner.answers.plan import plan
from chunkplan.planner.catalog import ModelEntry, find_gpu, find_model, gpus, models
from chunkplan.planner.search.evaluator import Evaluator
from chunkplan.planner.spec import GpuSpec, Plan, PlanRequest, Result


class Fit(Result):
    """One model on one device: whether it fits, with what schedule, or why not."""

    model: str
    gpu: str
    num_parameters: int | None
    fits: bool
    upper_bytes: int | None
    """Bound of the plan; None where none was made: the weights alone are too large, or the model is
    refused.
    """
    capacity_bytes: int
    step_seconds: float | None
    num_chunks: int | None
    why: str
    """Empty when it fits."""


@dataclass(frozen=True)
class _Question:
    model: ModelEntry
    gpu: GpuSpec
    training: TrainingSpec


def models_for(gpu: str | GpuSpec, training: TrainingSpec, num_fitting: int) -> Iterator[Fit]:
    """Catalog models on a device, the largest first, until ``num_fitting`` of them fit."""
    device = find_gpu(gpu)
    known = sorted(
        (entry for entry in models() if entry.num_parameters), key=lambda entry: -(entry.num_parameters or 0)
    )
    yield from _until(known, num_fitting, lambda entry: _fit(_Question(entry, device, training)))


def gpus_for(model: str, training: TrainingSpec, num_fitting: int) -> Iterator[Fit]:
    """Catalog devices for a model, the smallest first, until ``num_fitting`` of them hold it."""
    entry = find_model(model)
    known = sorted((gpu for gpu in gpus() if gpu.kind in ("cuda", "rocm")), key=lambda gpu: gpu.memory_bytes)
    yield from _until(known, num_fitting, lambda gpu: _fit(_Question(entry, gpu, training)))


def _until(asked: Sequence[object], num_fitting: int, answer: Callable[..., Fit]) -> Iterator[Fit]:
    for each in asked:
        fit = answer(each)
        yield fit
        num_fitting -= fit.fits
        if num_fitting <= 0:
            return


def _fit(question: _Question) -> Fit:
    model, gpu, training = question.model, question.gpu, question.training
    request = PlanRequest(model=model.id, gpu=gpu, training=training)
    evaluator = Evaluator(request)

    def answer(why: str, planned: Plan | None = None) -> Fit:
        return Fit(
            model=model.id,
            gpu=gpu.name,
            num_parameters=model.num_parameters,
            fits=planned is not None and planned.fits,
            upper_bytes=planned and planned.peak.upper_bytes,
            capacity_bytes=evaluator.capacity_bytes,
            step_seconds=planned and planned.step_seconds,
            num_chunks=planned and planned.schedule.num_chunks,
            why=why,
        )

    weights = (model.num_parameters or 0) * training.precision.itemsize
    if weights > evaluator.capacity_bytes:
        return answer(f"weights alone are {weights} bytes")
    try:
        planned = plan(request)
    except InputError as error:
        return answer(f"refused: {error}")
    return answer("" if planned.fits else planned.alternatives[0].why, planned)
