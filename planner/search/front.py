"""The front of ``auto``: schedules that are faster, smaller, or easier on the host than the chosen one.

Candidates are ranked by outlines, which are arithmetic; whatever is named has been computed exactly, the
allocator included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from chunkplan.engine.spec import CheckpointedLayers, Optimizer, ResolvedSchedule, StateDtype, TrainingSpec
from chunkplan.planner.search.evaluator import Evaluation, Evaluator, Outline
from chunkplan.planner.search.reasons import changes, size
from chunkplan.planner.search.schedules import AUTO_CHUNKS, as_alternative, schedules
from chunkplan.planner.spec import Alternative

SWITCH_EVERY = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24)
"""Updates per visit of a chunk that candidates of the front may have."""
MAX_FRONT = 3
"""Entries of the front beside the chosen schedule; each one costs a replay of its cycle."""
CHECKPOINTED_PARTS = 8
"""Checkpointing is tried on all layers, on 7/8 of them, …, on none."""
_NOTABLE = 0.97
"""An entry of the front must be better than every entry before it by this factor in something."""


def front(evaluator: Evaluator, chosen: Evaluation) -> list[Alternative]:
    """For ``auto``: schedules that are faster, or smaller, or need less host memory than any other found.

    The chosen one comes first. Each entry says what it changes, and how it differs in the end.
    """
    if evaluator.request.training.schedule != "auto":
        return []
    found = candidates(evaluator, chosen)
    base = evaluator.sketch(chosen.training, chosen.schedule)
    fragments = max(
        chosen.peak.upper_bytes - base.least_upper_bytes, 0
    )  # what the allocator is likely to add to others
    entries = []
    for what, outline in _ends_of_front(found, base, evaluator.capacity_bytes - fragments):
        other = evaluator.evaluate(outline.training, outline.schedule)
        if other.fits or not chosen.fits:
            entries.append(as_alternative(other, "pareto", f"{what}: {_difference(other, chosen)}"))
    is_smallest = min(each.least_upper_bytes for each in found) > _NOTABLE * base.least_upper_bytes
    why = _chosen_why(evaluator, chosen) + ("; nothing that was tried needs notably less" if is_smallest else "")
    return [as_alternative(chosen, "chosen", why), *entries]


def candidates(evaluator: Evaluator, chosen: Evaluation) -> list[Outline]:
    """Everything that may be varied, outlined: chunks, visits, states; checkpointing, loss, and how a batch
    is cut.

    Not varied are the order of the chunks, which changes neither peak nor time, and what decides the result
    of the training beyond what entries of the front say: the batch, the optimizer, precision, clipping,
    adapters.
    """
    training, schedule = chosen.training, chosen.schedule
    asked = [(training, kept) for kept in _with_other_states(training, schedule)]
    if training.method == "chunkft":
        counts = list(schedules(evaluator, schedule.model_copy(update={"num_chunks": 1})))
        counts = [each for each in counts if each.num_chunks <= max(AUTO_CHUNKS, schedule.num_chunks)]
        asked = [(training, kept) for each in counts for kept in _with_other_states(training, each)]
    for variant in _variants(training):
        asked += [(variant, kept) for kept in _with_other_states(variant, schedule)]
    outlines = [evaluator.sketch(each, kept) for each, kept in asked]
    return outlines + list(_partly_checkpointed(evaluator, outlines, schedule.num_chunks))


def _partly_checkpointed(evaluator: Evaluator, outlines: Sequence[Outline], num_chunks: int) -> Iterator[Outline]:
    """Between full checkpointing and none: the layers on top keep their activations, which are recomputed
    most often.

    Their bytes grow with every such layer, and the seconds fall: both are estimated on the line between the
    ends.
    """
    training = evaluator.request.training
    num_layers = evaluator.footprints(training).structure.num_layers
    by_choice: dict[str, dict[ResolvedSchedule, Outline]] = {"full": {}, "none": {}}
    for each in outlines:
        changed = each.training.model_copy(update={"activation_checkpointing": training.activation_checkpointing})
        if changed == training and each.schedule.num_chunks == num_chunks:
            choice = each.training.activation_checkpointing
            if isinstance(choice, str):
                by_choice[choice][each.schedule] = each
    specs = {}
    for part in range(1, CHECKPOINTED_PARTS):
        num_checkpointed = num_layers * part // CHECKPOINTED_PARTS
        if 0 < num_checkpointed < num_layers:
            layers = CheckpointedLayers(layers=list(range(num_checkpointed)))
            specs[num_checkpointed] = training.model_copy(update={"activation_checkpointing": layers})
    for schedule, full in by_choice["full"].items():
        none = by_choice["none"].get(schedule)
        if none is None:
            continue
        for num_checkpointed, spec in specs.items():
            yield _between(none, full, num_checkpointed / num_layers, spec)


def _between(begin: Outline, end: Outline, share: float, training: TrainingSpec) -> Outline:
    """The outline that lies by ``share`` of the way from one to the other; bytes are rounded up."""

    def of(first: int, last: int) -> int:
        return first + math.ceil((last - first) * share)

    return replace(
        end,
        training=training,
        allocated_bytes=of(begin.allocated_bytes, end.allocated_bytes),
        host_bytes=of(begin.host_bytes, end.host_bytes),
        least_upper_bytes=of(begin.least_upper_bytes, end.least_upper_bytes),
        step_seconds=begin.step_seconds + (end.step_seconds - begin.step_seconds) * share,
    )


def _with_other_states(training: TrainingSpec, schedule: ResolvedSchedule) -> Iterator[ResolvedSchedule]:
    """The schedule with states kept or reset, in every type that the optimizer knows, and longer visits."""
    dtypes: Sequence[StateDtype] = list(StateDtype)
    if training.optimizer in (Optimizer.ADAMW8BIT, Optimizer.ADAFACTOR):
        dtypes = [schedule.state_dtype]
    for num_updates in SWITCH_EVERY if schedule.num_chunks > 1 else (1,):
        for states in ("keep", "reset") if schedule.num_chunks > 1 else (schedule.states,):
            for dtype in dtypes:
                changed = {"switch_every": num_updates, "states": states, "state_dtype": dtype}
                yield schedule.model_copy(update=changed)


def _variants(training: TrainingSpec) -> Iterator[TrainingSpec]:
    """Yield other ways to compute the batch: recomputed or kept, in other pieces, with the other loss."""

    def changed(**update: Any) -> TrainingSpec:
        return training.model_copy(update=update)

    for choice in ("full", "none"):
        if training.activation_checkpointing != choice:
            yield changed(activation_checkpointing=choice)
    if training.loss == "standard":
        yield changed(loss="fused")
    size_of, steps = training.micro_batch_size, training.gradient_accumulation_steps
    if training.max_grad_norm is None and steps == 1 and not (training.update_in_backward or training.scales_loss):
        yield changed(update_in_backward=True)
    if steps % 2 == 0:
        yield changed(micro_batch_size=2 * size_of, gradient_accumulation_steps=steps // 2)
    if size_of % 2 == 0 and not training.update_in_backward:
        yield changed(micro_batch_size=size_of // 2, gradient_accumulation_steps=2 * steps)


def _ends_of_front(outlines: Sequence[Outline], chosen: Outline, capacity_bytes: int) -> list[tuple[str, Outline]]:
    """Return the ends of the front over (bound, seconds, host bytes): few entries that differ notably."""
    fitting = [outline for outline in outlines if outline.least_upper_bytes <= capacity_bytes]
    ends = {
        "the fastest that fits" if fitting else "the fastest": lambda each: (each.step_seconds, each.least_upper_bytes),
        "the smallest": lambda each: (each.least_upper_bytes, each.step_seconds),
        "the least host memory": lambda each: (each.host_bytes, each.step_seconds),
    }
    # What the optimizer remembers is worth more than what resetting it saves: such schedules come first.
    keeping = pareto([each for each in fitting or outlines if each.schedule.states == chosen.schedule.states])
    resetting = pareto([each for each in fitting or outlines if each.schedule.states != chosen.schedule.states])
    preferred = [(what, min(keeping, key=end)) for what, end in ends.items() if keeping]
    preferred += [(f"{what} with states reset", min(resetting, key=end)) for what, end in ends.items() if resetting]
    picked: list[tuple[str, Outline]] = []
    known = [_figures(chosen)]
    for at, (what, outline) in enumerate(preferred):
        figures = _figures(outline)
        if any(all(a > _NOTABLE * b for a, b in zip(figures, each, strict=True)) for each in known):
            continue
        known.append(figures)
        gains = [ours <= _NOTABLE * theirs for ours, theirs in zip(figures, known[0], strict=True)]
        is_end = gains[at % len(ends)]  # of what does not differ notably, one is the least by chance
        picked.append((what if is_end else _GAINS[gains.index(True)] if any(gains) else "between", outline))
    return sorted(picked[:MAX_FRONT], key=lambda each: each[1].step_seconds)


def pareto(outlines: Sequence[Outline]) -> list[Outline]:
    """Those that no other one equals or beats in bound, seconds and host bytes alike; the fastest first."""
    kept: list[Outline] = []
    for outline in sorted(outlines, key=lambda each: (each.step_seconds, each.least_upper_bytes, each.host_bytes)):
        if not any(
            each.least_upper_bytes <= outline.least_upper_bytes and each.host_bytes <= outline.host_bytes
            for each in kept
        ):
            kept.append(outline)
    return kept


_GAINS = ("faster", "smaller", "less host memory")


def _figures(outline: Outline) -> tuple[float, float, float]:
    return outline.step_seconds, outline.least_upper_bytes, outline.host_bytes


def _difference(found: Evaluation, chosen: Evaluation) -> str:
    """One sentence: what it changes, and what that brings and costs against the chosen one."""
    what = changes(found.training, chosen.training, found.schedule, chosen.schedule)
    seconds = found.step_seconds / chosen.step_seconds - 1
    parts = [f"{abs(seconds):.0%} {'less' if seconds < 0 else 'more'} time"] if abs(seconds) >= 0.01 else []
    for label, ours, theirs in (
        ("", found.peak.upper_bytes, chosen.peak.upper_bytes),
        (" of host memory", found.peak.host_bytes, chosen.peak.host_bytes),
    ):
        if abs(ours - theirs) >= 2**20:
            parts.append(f"{size(abs(ours - theirs))} {'less' if ours < theirs else 'more'}{label}")
    note = (
        "; without what the optimizer remembered" if found.schedule.states == "reset" != chosen.schedule.states else ""
    )
    return f"{what}: {', '.join(parts) or 'the same figures'}{note}"


def _chosen_why(evaluator: Evaluator, chosen: Evaluation) -> str:
    if not chosen.fits:
        return "the smallest that was found"
    if chosen.training.method != "chunkft":
        return f"method '{chosen.training.method}' has one schedule"
    at_limit = chosen.schedule.num_chunks >= AUTO_CHUNKS
    finer = "a longer cycle reaches each parameter too rarely" if at_limit else "twice as many chunks gain under 5 %"
    return f"fastest that fits with nothing else changed; {finer}"
