"""One model on several devices by several methods, each answer or refusal on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import TypeVar

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import ModelRef, TrainingSpec, parse
from chunkplan.planner.answers.plan import plan
from chunkplan.planner.spec import GpuRef, Plan, PlanRequest, Result

Answer = TypeVar("Answer")


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
    answers = each_pair(model, gpus, methods, training, memory_limit_bytes, plan)
    refusals = [answer for _, _, answer in answers if isinstance(answer, InputError)]
    if refusals and len(refusals) == len(answers):
        raise refusals[0]
    return [_compared(*answer) for answer in answers]


def _compared(gpu: str, method: str, answer: Plan | InputError) -> Compared:
    if isinstance(answer, InputError):
        return Compared(gpu=gpu, method=method, field=answer.field, refusal=answer.message)
    return Compared(gpu=gpu, method=method, plan=answer)


def each_pair(
    model: ModelRef,
    gpus: Sequence[GpuRef],
    methods: Sequence[str],
    training: TrainingSpec,
    memory_limit_bytes: int | None,
    ask: Callable[[PlanRequest], Answer],
) -> list[tuple[str, str, Answer | InputError]]:
    """(device, method, what ``ask`` says or how it refuses) of every device and method, devices outermost."""
    found: list[tuple[str, str, Answer | InputError]] = []
    for gpu, method in product(gpus, methods):
        name = gpu if isinstance(gpu, str) else gpu.name
        try:
            found.append((name, method, ask(_single_request(model, gpu, method, training, memory_limit_bytes))))
        except InputError as error:
            found.append((name, method, error))
    return found


def _single_request(
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
