"""Which schedule to take: the request's, or the one that ``auto`` finds; and what else could be taken.

``auto`` chooses the number of chunks and nothing else: all the rest of the spec, and what the optimizer
remembers, stays as asked, whether it was written out or left to its default, which is the same request. What
can be had by changing more is on the front, and every entry says what it changes. Candidates are ranked by
outlines, which are arithmetic; whatever is named has been computed exactly, the allocator included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from chunkplan.engine.spec import (
    CheckpointedLayers,
    Optimizer,
    ScheduleSpec,
    StateDtype,
    TrainingSpec,
    default_schedule,
)
from chunkplan.planner.answers.plan import Evaluation, Outline, Planner
from chunkplan.planner.search.reasons import cause, changes, size
from chunkplan.planner.spec import Alternative

MAX_CHUNKS = 512
"""Finer schedules are not proposed: past this the chunk's own memory is small against everything else."""
AUTO_CHUNKS = 64
"""``auto`` goes no finer while anything fits: a cycle of more updates reaches each parameter too rarely."""
SWITCH_EVERY = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24)
"""Updates per visit of a chunk that candidates of the front may have."""
MAX_FRONT = 3
"""Entries of the front beside the chosen schedule; each one costs a replay of its cycle."""

CHECKPOINTED_PARTS = 8
"""Checkpointing is tried on all layers, on 7/8 of them, …, on none."""

_WORTHWHILE = 0.95
"""Twice as many chunks must bring the step below this share of its time."""
_NOTABLE = 0.97
"""An entry of the front must be better than every entry before it by this factor in something."""


def choose(planner: Planner) -> Evaluation:
    """The requested schedule, evaluated; for ``auto`` the fastest that fits, or the smallest peak when none
    does.

    More chunks make an update cheaper, but with every doubling by less: the search ends where it gains under
    5 %.
    """
    training = planner.request.training
    if training.schedule != "auto":
        return planner.evaluate(training, training.schedule)
    base = default_schedule(training.optimizer, 1)
    if training.method != "chunkft":
        return planner.evaluate(training, base)
    if planner.floor_bytes(training) > planner.capacity_bytes:
        return planner.evaluate(training, _with_chunks(planner, base, AUTO_CHUNKS))
    outlines: list[Outline] = []
    best: Outline | None = None
    for schedule in _schedules(planner, base):
        outline = planner.outline(training, schedule)
        if best is not None and not _is_worthwhile(outline, best):
            break
        outlines.append(outline)
        if outline.least_upper_bytes <= planner.capacity_bytes:
            best = outline
    while True:
        best = next((each for each in reversed(outlines) if each.least_upper_bytes <= planner.capacity_bytes), None)
        if best is None or len(outlines) == 1:
            return planner.complete(best or min(outlines, key=lambda each: each.least_upper_bytes))
        found = planner.complete(best)
        if found.fits:
            return found
        outlines.remove(best)


def _is_worthwhile(finer: Outline, best: Outline) -> bool:
    return finer.schedule.num_chunks <= AUTO_CHUNKS and finer.step_seconds <= _WORTHWHILE * best.step_seconds


def front(planner: Planner, chosen: Evaluation) -> list[Alternative]:
    """For ``auto``: schedules that are faster, or smaller, or need less host memory than any other found.

    The chosen one comes first. Each entry says what it changes, and how it differs in the end.
    """
    if planner.request.training.schedule != "auto":
        return []
    found = candidates(planner, chosen)
    base = planner.sketch(chosen.training, chosen.schedule)
    fragments = max(
        chosen.peak.upper_bytes - base.least_upper_bytes, 0
    )  # what the allocator is likely to add to others
    entries = []
    for what, outline in _picked(found, base, planner.capacity_bytes - fragments):
        other = planner.evaluate(outline.training, outline.schedule)
        if other.fits or not chosen.fits:
            entries.append(_entry(other, "pareto", f"{what}: {_difference(other, chosen)}"))
    is_smallest = min(each.least_upper_bytes for each in found) > _NOTABLE * base.least_upper_bytes
    why = _chosen_why(planner, chosen) + ("; nothing that was tried needs notably less" if is_smallest else "")
    return [_entry(chosen, "chosen", why), *entries]


def candidates(planner: Planner, chosen: Evaluation) -> list[Outline]:
    """Everything that may be varied, outlined: chunks, visits, states; checkpointing, loss, and how a batch
    is cut.

    Not varied are the order of the chunks, which changes neither peak nor time, and what decides the result
    of the training beyond what entries of the front say: the batch, the optimizer, precision, clipping,
    adapters.
    """
    training, schedule = chosen.training, chosen.schedule
    asked = [(training, kept) for kept in _kept(training, schedule)]
    if training.method == "chunkft":
        counts = list(_schedules(planner, schedule.model_copy(update={"num_chunks": 1})))
        counts = [each for each in counts if each.num_chunks <= max(AUTO_CHUNKS, schedule.num_chunks)]
        asked = [(training, kept) for each in counts for kept in _kept(training, each)]
    for variant in _variants(training):
        asked += [(variant, kept) for kept in _kept(variant, schedule)]
    outlines = [planner.sketch(each, kept) for each, kept in asked]
    return outlines + list(_partly_checkpointed(planner, outlines, schedule.num_chunks))


def _partly_checkpointed(planner: Planner, outlines: Sequence[Outline], num_chunks: int) -> Iterator[Outline]:
    """Between full checkpointing and none: the layers on top keep their activations, which are recomputed
    most often.

    Their bytes grow with every such layer, and the seconds fall: both are estimated on the line between the
    ends.
    """
    training = planner.request.training
    num_layers = planner.footprints(training).structure.num_layers
    by_choice: dict[str, dict[ScheduleSpec, Outline]] = {"full": {}, "none": {}}
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


def _kept(training: TrainingSpec, schedule: ScheduleSpec) -> Iterator[ScheduleSpec]:
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
    """The same batch and model, computed otherwise: recomputed or kept, in other pieces, with the
    other loss.
    """

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


def _picked(outlines: Sequence[Outline], chosen: Outline, capacity_bytes: int) -> list[tuple[str, Outline]]:
    """Of the front over (bound, seconds, host bytes) the ends, by what they are: few entries that differ
    notably.
    """
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


def _chosen_why(planner: Planner, chosen: Evaluation) -> str:
    if not chosen.fits:
        return "the smallest that was found"
    if chosen.training.method != "chunkft":
        return f"method '{chosen.training.method}' has one schedule"
    at_limit = chosen.schedule.num_chunks >= AUTO_CHUNKS
    finer = "a longer cycle reaches each parameter too rarely" if at_limit else "twice as many chunks gain under 5 %"
    return f"fastest that fits with nothing else changed; {finer}"


def alternatives(planner: Planner, chosen: Evaluation) -> list[Alternative]:
    """When the chosen schedule does not fit: the nearest that does, or the smallest there is and how much it
    lacks.
    """
    if chosen.fits:
        return []
    floor = planner.floor_bytes(chosen.training)
    if floor > planner.capacity_bytes:
        missing = floor - planner.capacity_bytes
        why = (
            "no schedule with resident weights fits: weights, libraries and context alone need "
            f"{floor} bytes, {missing} more than the device has"
        )
        return [_entry(chosen, "smallest", why)]
    obstacle = explain(planner, chosen)
    smallest: Outline | None = None
    for training, schedule in _relaxations(planner, chosen):
        outline = planner.outline(training, schedule)
        if outline.least_upper_bytes <= planner.capacity_bytes:
            candidate = planner.complete(outline)
            if candidate.fits:
                what = changes(training, chosen.training, schedule, chosen.schedule)
                return [_entry(candidate, "nearest", f"nearest that fits: {what}; as asked, {obstacle}")]
        if smallest is None or outline.least_upper_bytes < smallest.least_upper_bytes:
            smallest = outline
    least = chosen
    if smallest is not None:
        found = planner.complete(smallest)
        least = found if found.peak.upper_bytes < chosen.peak.upper_bytes else chosen
    missing = least.peak.upper_bytes - planner.capacity_bytes
    why = f"no schedule that was tried fits: the smallest lacks {missing} bytes; {explain(planner, least)}"
    return [_entry(least, "smallest", why)]


def explain(planner: Planner, evaluation: Evaluation) -> str:
    """What takes most of an evaluation's peak beside the weights, in bytes: one clause."""
    structure = planner.footprints(evaluation.training).structure
    chunk = evaluation.chunks[evaluation.peak.chunk_index].chunk
    return cause(structure, chunk, evaluation.training, evaluation.peak)


def _relaxations(planner: Planner, chosen: Evaluation) -> Iterator[tuple[TrainingSpec, ScheduleSpec]]:
    """Ways to need less memory, the least intrusive first: chunks, checkpointing and fused loss,
    the batch.
    """
    training, schedule = chosen.training, chosen.schedule
    if training.method == "chunkft":
        for finer in _schedules(planner, schedule):
            if finer.num_chunks > schedule.num_chunks:
                yield training, finer
    lean = training.model_copy(update={"activation_checkpointing": "full", "loss": "fused"})
    most = schedule
    if training.method == "chunkft":
        most = _with_chunks(planner, schedule, max(schedule.num_chunks, AUTO_CHUNKS))
    if lean != training:
        yield lean, most
    if training.micro_batch_size > 1 and not training.update_in_backward:
        steps = training.gradient_accumulation_steps * training.micro_batch_size
        yield lean.model_copy(update={"micro_batch_size": 1, "gradient_accumulation_steps": steps}), most
    if training.method == "full":
        chunked = lean.model_copy(update={"method": "chunkft"})
        for num_chunks in (8, 32, 128):
            yield chunked, _with_chunks(planner, schedule, num_chunks)


def _schedules(planner: Planner, base: ScheduleSpec) -> Iterator[ScheduleSpec]:
    """The schedule with 1, 2, 4, … times as many chunks, as far as the model has rows and a proposal makes
    sense.
    """
    known = 0
    num_chunks = base.num_chunks
    while num_chunks <= MAX_CHUNKS:
        schedule = _with_chunks(planner, base, num_chunks)
        if schedule.num_chunks > known:
            yield schedule
        known = schedule.num_chunks
        num_chunks *= 2


def _with_chunks(planner: Planner, schedule: ScheduleSpec, num_chunks: int) -> ScheduleSpec:
    structure = planner.footprints(planner.request.training).structure
    num_rows = sum(info.num_rows for info in structure.parameters)
    return schedule.model_copy(update={"num_chunks": min(num_chunks, num_rows)})


def _entry(evaluation: Evaluation, role: Literal["chosen", "pareto", "nearest", "smallest"], why: str) -> Alternative:
    return Alternative(
        role=role,
        schedule=evaluation.schedule,
        training=evaluation.training.model_copy(update={"schedule": evaluation.schedule}),
        peak=evaluation.peak,
        step_seconds=evaluation.step_seconds,
        fits=evaluation.fits,
        why=why,
    )
