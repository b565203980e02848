"""One model on several devices by several methods, each answer or refusal on its own."""

from __future__ import annotations

from collections.abc import Sequence

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import ModelRef, TrainingSpec, parse
from chunkplan.planner.answers.plan import plan
from chunkplan.planner.spec import GpuRef, Plan, PlanRequest, Result


class Compared(Result):
    """The plan of one device and method, or why there is none."""

    gpu: str
    method: str
    plan: Plan | None = None
    field: str | None = None
    """Which field of the request is refused."""
    refusal: str | None = None


def compare(
    model: ModelRef,
    gpus: Sequence[GpuRef],
    methods: Sequence[str],
    training: TrainingSpec,
    memory_limit_bytes: int | None = None,
) -> list[Compared]:
    """A plan for every device and method, devices outermost.

    Raises:
        InputError: all of them are refused; names the first one's field.
    """
    found, first = [], None
    for gpu in gpus:
        for method in methods:
            name = gpu if isinstance(gpu, str) else gpu.name
            try:
                planned = plan(single_request(model, gpu, method, training, memory_limit_bytes))
                found.append(Compared(gpu=name, method=method, plan=planned))
            except InputError as error:
                first = first or error
                found.append(Compared(gpu=name, method=method, field=error.field, refusal=error.message))
    if first is not None and all(entry.plan is None for entry in found):
        raise first
    return found


def single_request(
    model: ModelRef, gpu: GpuRef, method: str, training: TrainingSpec, memory_limit_bytes: int | None
) -> PlanRequest:
    """The request of one pair; a method of one chunk takes everything but the schedule.

    Raises:
        InputError: the method does not go with the rest of the spec.
    """
    values = training.model_dump() | {"method": method}
    if method != "chunkft":
        values["schedule"] = {"num_chunks": 1}
    if method != "lora":
        values["lora"] = None
    try:
        spec = parse(TrainingSpec, values)
    except InputError as error:
        raise InputError(f"training.{error.field}", error.message) from error
    return PlanRequest(model=model, gpu=gpu, memory_limit_bytes=memory_limit_bytes, training=spec)
