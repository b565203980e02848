"""What to do when a schedule does not fit: the nearest one that does, or the smallest there is."""

from __future__ import annotations

from collections.abc import Iterator

from chunkplan.engine.spec import ResolvedSchedule, TrainingSpec
from chunkplan.planner.search.evaluator import Evaluation, Evaluator, Outline
from chunkplan.planner.search.reasons import cause, changes
from chunkplan.planner.search.schedules import AUTO_CHUNKS, as_alternative, schedules, with_chunks
from chunkplan.planner.spec import Alternative


def alternatives(evaluator: Evaluator, chosen: Evaluation) -> list[Alternative]:
    """When the chosen schedule does not fit: the nearest that does, or the smallest there is and how much it
    lacks.
    """
    if chosen.fits:
        return []
    floor = evaluator.floor_bytes(chosen.training)
    if floor > evaluator.capacity_bytes:
        missing = floor - evaluator.capacity_bytes
        why = (
            "no schedule with resident weights fits: weights, libraries and context alone need "
            f"{floor} bytes, {missing} more than the device has"
        )
        return [as_alternative(chosen, "smallest", why)]
    obstacle = explain(evaluator, chosen)
    smallest: Outline | None = None
    for training, schedule in _relaxations(evaluator, chosen):
        outline = evaluator.outline(training, schedule)
        if outline.least_upper_bytes <= evaluator.capacity_bytes:
            candidate = evaluator.complete(outline)
            if candidate.fits:
                what = changes(training, chosen.training, schedule, chosen.schedule)
                return [as_alternative(candidate, "nearest", f"nearest that fits: {what}; as asked, {obstacle}")]
        if smallest is None or outline.least_upper_bytes < smallest.least_upper_bytes:
            smallest = outline
    least = chosen
    if smallest is not None:
        found = evaluator.complete(smallest)
        least = found if found.peak.upper_bytes < chosen.peak.upper_bytes else chosen
    missing = least.peak.upper_bytes - evaluator.capacity_bytes
    why = f"no schedule that was tried fits: the smallest lacks {missing} bytes; {explain(evaluator, least)}"
    return [as_alternative(least, "smallest", why)]


def explain(evaluator: Evaluator, evaluation: Evaluation) -> str:
    """What takes most of an evaluation's peak beside the weights, in bytes: one clause."""
    structure = evaluator.footprints(evaluation.training).structure
    chunk = evaluation.chunks[evaluation.peak.chunk_index].chunk
    return cause(structure, chunk, evaluation.training, evaluation.peak)


def _relaxations(evaluator: Evaluator, chosen: Evaluation) -> Iterator[tuple[TrainingSpec, ResolvedSchedule]]:
    """Ways to need less memory, the least intrusive first: chunks, checkpointing and fused loss,
    the batch.
    """
    training, schedule = chosen.training, chosen.schedule
    if training.method == "chunkft":
        for finer in schedules(evaluator, schedule):
            if finer.num_chunks > schedule.num_chunks:
                yield training, finer
    lean = training.model_copy(update={"activation_checkpointing": "full", "loss": "fused"})
    most = schedule
    if training.method == "chunkft":
        most = with_chunks(evaluator, schedule, max(schedule.num_chunks, AUTO_CHUNKS))
    if lean != training:
        yield lean, most
    if training.micro_batch_size > 1 and not training.update_in_backward:
        steps = training.gradient_accumulation_steps * training.micro_batch_size
        yield lean.model_copy(update={"micro_batch_size": 1, "gradient_accumulation_steps": steps}), most
    if training.method == "full":
        chunked = lean.model_copy(update={"method": "chunkft"})
        for num_chunks in (8, 32, 128):
            yield chunked, with_chunks(evaluator, schedule, num_chunks)
