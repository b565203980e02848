"""What does not go together, once: training spec, ``ChunkFT`` and documentation all read this table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from chunkplan.engine.spec.choices import Master, Optimizer, Precision, StateDtype
from chunkplan.engine.spec.schedule import ScheduleSpec


class Asked(Protocol):
    """What refusals read of a :class:`chunkplan.engine.spec.TrainingSpec`."""

    @property
    def method(self) -> str: ...
    @property
    def has_one_chunk(self) -> bool: ...
    @property
    def lora(self) -> object | None: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def autocast(self) -> str: ...
    @property
    def scales_loss(self) -> bool: ...
    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def gradient_accumulation_steps(self) -> int: ...
    @property
    def max_grad_norm(self) -> float | None: ...
    @property
    def update_in_backward(self) -> bool: ...
    @property
    def asked_schedule(self) -> ScheduleSpec: ...


@dataclass(frozen=True, slots=True)
class RefusedPair:
    """One combination of options that cannot be trained."""

    field: str
    """Dotted name, within the training spec, of the option to change."""
    message: str
    """Why, and what to use instead."""
    applies: Callable[[Asked], bool]
    """Whether a spec asks for it."""


def refusal_of(training: Asked) -> RefusedPair | None:
    """Return the first refusal that a spec runs into; None for one that can be trained."""
    return next((refusal for refusal in REFUSALS if refusal.applies(training)), None)


def _expands(training: Asked) -> bool:
    return training.asked_schedule.expansion != "none"


def _master(training: Asked) -> Master:
    return training.asked_schedule.master


def _has_residuals(training: Asked) -> bool:
    return _master(training) is Master.RESIDUAL


def _state_dtype_is_not(training: Asked, optimizer: Optimizer, dtype: StateDtype) -> bool:
    return training.optimizer is optimizer and training.asked_schedule.state_dtype not in (None, dtype)


REFUSALS = (
    RefusedPair(
        "schedule.expansion",
        "expansion 'factored' would leave residual masters behind: use master 'none' or 'fp32'",
        lambda training: _expands(training) and _has_residuals(training),
    ),
    RefusedPair(
        "max_grad_norm",
        "update_in_backward never sees the whole chunk's gradient norm: set max_grad_norm to null",
        lambda training: training.update_in_backward and training.max_grad_norm is not None,
    ),
    RefusedPair(
        "gradient_accumulation_steps",
        "update_in_backward updates in every backward pass: use gradient_accumulation_steps 1",
        lambda training: training.update_in_backward and training.gradient_accumulation_steps > 1,
    ),
    RefusedPair(
        "schedule.state_dtype",
        "'adamw8bit' is AdamW with int8 states: use optimizer 'adamw' for others",
        lambda training: _state_dtype_is_not(training, Optimizer.ADAMW8BIT, StateDtype.INT8),
    ),
    RefusedPair(
        "schedule.state_dtype",
        "'adafactor' keeps a row and a column of fp32 per matrix: use 'fp32'",
        lambda training: _state_dtype_is_not(training, Optimizer.ADAFACTOR, StateDtype.FP32),
    ),
    RefusedPair(
        "autocast",
        "autocast is for fp32 weights: use precision 'fp32', or autocast 'none'",
        lambda training: training.autocast != "none" and training.precision is not Precision.FP32,
    ),
    RefusedPair(
        "update_in_backward",
        "update_in_backward comes before fp16 can tell whether a gradient overflowed: use bf16",
        lambda training: training.scales_loss and training.update_in_backward,
    ),
    RefusedPair(
        "schedule.expansion",
        "expansion updates in backward, before fp16 can tell of an overflow: use bf16",
        lambda training: training.scales_loss and _expands(training),
    ),
    RefusedPair(
        "schedule.master",
        "master 'residual' is exact for bf16 weights only: use 'fp32' or 'none' with fp16",
        lambda training: training.scales_loss and _has_residuals(training),
    ),
    RefusedPair(
        "schedule.master",
        "fp32 weights are their own master: use schedule.master 'none' with precision 'fp32'",
        lambda training: training.precision is Precision.FP32 and _master(training) is not Master.NONE,
    ),
    RefusedPair(
        "schedule.num_chunks",
        "a method with one chunk is the schedule with num_chunks 1; use method 'chunkft' for more",
        lambda training: training.has_one_chunk and training.asked_schedule.num_chunks not in (None, 1),
    ),
    RefusedPair(
        "lora",
        "lora is given, but the method is another: use method 'lora'",
        lambda training: training.method != "lora" and training.lora is not None,
    ),
    RefusedPair(
        "schedule.master",
        "adapters are fp32, their own master: use schedule.master 'none' with method 'lora'",
        lambda training: training.method == "lora" and _master(training) is not Master.NONE,
    ),
    RefusedPair(
        "schedule.expansion",
        "method 'lora' trains nothing above its one chunk: use schedule.expansion 'none'",
        lambda training: training.method == "lora" and _expands(training),
    ),
)
"""In the order in which they are looked for."""
