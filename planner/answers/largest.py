"""The largest batch or length that fits.

Imports no torch, like every other plan.
"""

from __future__ import annotations

from typing import Literal

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import ResolvedSchedule, TrainingSpec, default_schedule
from chunkplan.planner.answers.plan import plan
from chunkplan.planner.catalog import ModelEntry
from chunkplan.planner.search.alternatives import explain
from chunkplan.planner.search.evaluator import MAX_MICRO_BATCH_TOKENS, Evaluator, Outline
from chunkplan.planner.search.schedules import AUTO_CHUNKS
from chunkplan.planner.spec import Plan, PlanRequest, Result

Grown = Literal["seq_len", "micro_batch_size"]
STEPS: dict[Grown, int] = {"seq_len": 64, "micro_batch_size": 1}
"""The answer is a multiple of this."""


class Largest(Result):
    """The largest value of a field that fits, the plan at it, and what stands in the way of the next one."""

    field: Grown
    value: int
    """A multiple of ``step``; 0: not even the first one fits."""
    step: int
    plan: Plan
    """At ``value``; at the first step when nothing fits."""
    limit: str
    """Why it is not larger, in one sentence."""


def largest(request: PlanRequest, field: Grown) -> Largest:
    """The largest ``seq_len`` or ``micro_batch_size`` with which the request fits; all else stays as it is.

    ``schedule: auto`` is searched with the finest schedule that it would take. Few traces: between the ends
    only the chunks that were the highest so far are looked at, and the answer and its successor are planned
    whole.
    """
    return _Growth(request, field).run()


class _Growth:
    def __init__(self, request: PlanRequest, field: Grown) -> None:
        self._request = request
        self._field: Grown = field
        self._step = STEPS[field]
        self._evaluator = Evaluator(request)
        self._most, self._most_why = self._ceiling()
        self._critical: set[int] = set()
        self._slack_bytes = 0
        self._trainings: dict[int, TrainingSpec] = {}

    def run(self) -> Largest:
        self._learn(self._outline(self._step))
        low, high = 0, self._most + self._step
        guess = self._search(low, high)
        has_tried_next = False
        while high - low > self._step:
            if not low < guess < high:
                guess = (low + high) // 2 // self._step * self._step
            if self._is_planned_to_fit(guess):
                low = guess
                guess = 0 if has_tried_next else low + self._step
                has_tried_next = True
            else:
                high = guess
                guess = self._search(low, high)
        if low == 0:
            return self._answer(0, self._why_not(self._step))
        return self._answer(low, self._most_why if high > self._most else self._why_not(high))

    def _search(self, low: int, high: int) -> int:
        """Largest multiple of the step in [``low``, ``high``) that seems to fit: it doubles, then halves the
        rest.
        """
        reach = max(low, self._step)
        while reach < high and self._seems_to_fit(reach):
            low, reach = reach, 2 * reach
        high = min(high, reach)
        while high - low > self._step:
            middle = (low + high) // 2 // self._step * self._step
            low, high = (middle, high) if self._seems_to_fit(middle) else (low, middle)
        return low

    def _seems_to_fit(self, value: int) -> bool:
        training, schedule = self._training(value), self._schedule()
        footprints = self._evaluator.footprints(training)
        chunks = footprints.chunks(schedule.num_chunks)
        peak = max(footprints.of_chunk(chunks[index], schedule).peak_bytes for index in self._critical)
        footprints.store.save()
        return self._evaluator.least_upper_bytes(training, schedule, peak) + self._slack_bytes <= self._capacity_bytes

    def _is_planned_to_fit(self, value: int) -> bool:
        outline = self._outline(value)
        self._learn(outline)
        if outline.least_upper_bytes > self._capacity_bytes:
            return False
        peak = self._evaluator.complete(outline).peak
        self._slack_bytes = peak.upper_bytes - outline.least_upper_bytes
        return peak.upper_bytes <= self._capacity_bytes

    def _outline(self, value: int) -> Outline:
        return self._evaluator.outline(self._training(value), self._schedule())

    def _learn(self, outline: Outline) -> None:
        self._critical.add(max(outline.chunks, key=lambda chunk: chunk.peak_bytes).chunk.index)

    def _training(self, value: int) -> TrainingSpec:
        if value not in self._trainings:
            self._trainings[value] = self._request.training.model_copy(update={self._field: value})
        return self._trainings[value]

    def _schedule(self) -> ResolvedSchedule:
        training = self._request.training
        if training.schedule != "auto":
            return training.resolved().schedule
        return default_schedule(training.optimizer, AUTO_CHUNKS if training.method == "chunkft" else 1)

    @property
    def _capacity_bytes(self) -> int:
        return self._evaluator.capacity_bytes

    def _why_not(self, value: int) -> str:
        evaluation = self._evaluator.complete(self._outline(value))
        lacking = evaluation.peak.upper_bytes - self._capacity_bytes
        return f"{self._field} {value} lacks {lacking} bytes; {explain(self._evaluator, evaluation)}"

    def _answer(self, value: int, limit: str) -> Largest:
        training = self._training(value or self._step).resolved(self._schedule())
        request = self._request.model_copy(update={"training": training})
        return Largest(field=self._field, value=value, step=self._step, plan=plan(request), limit=limit)

    def _ceiling(self) -> tuple[int, str]:
        training = self._request.training
        other = training.micro_batch_size if self._field == "seq_len" else training.seq_len
        most, why = MAX_MICRO_BATCH_TOKENS // other, f"plans end at {MAX_MICRO_BATCH_TOKENS} tokens per micro-batch"
        positions = _positions(self._evaluator.model)
        if self._field == "seq_len" and positions is not None and positions < most:
            most, why = positions, f"the model has {positions} positions"
        if most < self._step:
            raise InputError(f"training.{self._field}", f"nothing to search: {why}")
        return most // self._step * self._step, why


def _positions(model: ModelEntry) -> int | None:
    """The longest sequence that the model was made for; None where its configuration does not say."""
    for config in (model.config, model.config.get("text_config") or {}):
        for key in ("max_position_embeddings", "n_positions"):
            if isinstance(config.get(key), int):
                return int(config[key])
    return None
