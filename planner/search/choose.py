"""Which schedule to take: the request's, or the one that ``auto`` finds.

``auto`` chooses the number of chunks and nothing else: all the rest of the spec, and what the optimizer
remembers, stays as asked, whether it was written out or left to its default, which is the same request. What
can be had by changing more is on the front (:mod:`chunkplan.planner.search.front`).
"""

from __future__ import annotations

from chunkplan.engine.spec import default_schedule
from chunkplan.planner.search.evaluator import Evaluation, Evaluator, Outline
from chunkplan.planner.search.schedules import AUTO_CHUNKS, schedules, with_chunks

_WORTHWHILE = 0.95
"""Twice as many chunks must bring the step below this share of its time."""


def choose(evaluator: Evaluator) -> Evaluation:
    """The requested schedule, evaluated; for ``auto`` the fastest that fits, or the smallest peak when none
    does.

    More chunks make an update cheaper, but with every doubling by less: the search ends where it gains under
    5 %.
    """
    training = evaluator.request.training
    if training.schedule != "auto":
        return evaluator.evaluate(training, training.resolved().schedule)
    base = default_schedule(training.optimizer, 1)
    if training.method != "chunkft":
        return evaluator.evaluate(training, base)
    if evaluator.floor_bytes(training) > evaluator.capacity_bytes:
        return evaluator.evaluate(training, with_chunks(evaluator, base, AUTO_CHUNKS))
    outlines: list[Outline] = []
    best: Outline | None = None
    for schedule in schedules(evaluator, base):
        outline = evaluator.outline(training, schedule)
        if best is not None and not _is_worthwhile(outline, best):
            break
        outlines.append(outline)
        if outline.least_upper_bytes <= evaluator.capacity_bytes:
            best = outline
    while True:
        best = next((each for each in reversed(outlines) if each.least_upper_bytes <= evaluator.capacity_bytes), None)
        if best is None or len(outlines) == 1:
            return evaluator.complete(best or min(outlines, key=lambda each: each.least_upper_bytes))
        found = evaluator.complete(best)
        if found.fits:
            return found
        outlines.remove(best)


def _is_worthwhile(finer: Outline, best: Outline) -> bool:
    return finer.schedule.num_chunks <= AUTO_CHUNKS and finer.step_seconds <= _WORTHWHILE * best.step_seconds
