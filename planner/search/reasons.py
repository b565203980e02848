"""Sentences about a peak: what it consists of, and what would make it smaller. Pure."""

from __future__ import annotations

from chunkplan.engine.arithmetic import ceil_div
from chunkplan.engine.spec import CheckpointedLayers, ResolvedSchedule, TrainingSpec
from chunkplan.engine.stream.chunks import Chunk
from chunkplan.planner.spec import Peak
from chunkplan.planner.trace.structure import ModelStructure

_GIB, _MIB = 2**30, 2**20
_MAX_ADVISED_PIECES = 64
_SMALL_SHARE = 0.25
"""Share of what is not weights: a chunk's own memory below it is not what stands in the way."""


def size(num_bytes: int) -> str:
    """``7.8 GiB``, ``96 MiB``, ``512 bytes``."""
    if abs(num_bytes) >= _GIB:
        return f"{num_bytes / _GIB:.1f} GiB"
    return f"{num_bytes / _MIB:.0f} MiB" if abs(num_bytes) >= _MIB else f"{num_bytes} bytes"


def cause(structure: ModelStructure, chunk: Chunk, training: TrainingSpec, peak: Peak) -> str:
    """What takes most of the peak beside the weights, and the remedy: one clause.

    Args:
        structure: of the model.
        chunk: the one that the peak belongs to.
        training: the spec that was planned.
        peak: the peak.
    """
    parts = peak.breakdown.model_dump()
    weights = parts.pop("weights")
    own = parts["gradients"] + parts["optimizer_states"]
    biggest = max(parts, key=lambda name: parts[name])
    if own >= _SMALL_SHARE * sum(parts.values()) and own >= parts["activations"] + parts["loss"]:
        states = "gradients and states" if min(parts["gradients"], parts["optimizer_states"]) > own // 10 else (
            "states" if parts["optimizer_states"] > parts["gradients"] else "gradients"
        )  # fmt: skip
        what = f"{states} of {_described(structure, chunk, training)} are {size(own)}"
        pieces = min(max(2, ceil_div(own, max(weights // 64, 1))), _MAX_ADVISED_PIECES)
        return f"{what}: cut it into {pieces}" if training.method != "lora" else f"{what}: use a smaller rank"
    if biggest == "activations":
        kept = f"activations in {peak.phase} of chunk {peak.chunk_index} are {size(parts['activations'])}"
        if training.activation_checkpointing != "full":
            return f"{kept}: checkpoint them"
        return (
            f"{kept}: use shorter sequences" if training.micro_batch_size == 1 else f"{kept}: use smaller micro-batches"
        )
    if biggest == "loss":
        remedy = "use the fused loss" if training.loss == "standard" else "use shorter or fewer sequences"
        return f"logits and their gradients are {size(parts['loss'])}: {remedy}"
    return f"{biggest.replace('_', ' ')} takes {size(parts[biggest])} beside {size(weights)} of weights"


def changes(training: TrainingSpec, asked: TrainingSpec, schedule: ResolvedSchedule, base: ResolvedSchedule) -> str:
    """What a schedule does otherwise than the one it is compared with; empty when nothing."""
    found = []
    if training.method != asked.method:
        found.append(f"method '{training.method}'")
    if schedule.num_chunks != base.num_chunks:
        found.append(f"{schedule.num_chunks} chunks instead of {base.num_chunks}")
    if schedule.switch_every != base.switch_every:
        found.append(f"{schedule.switch_every} updates of a chunk in a row")
    if schedule.states != base.states:
        found.append(f"states {schedule.states}")
    if schedule.state_dtype != base.state_dtype:
        found.append(f"{schedule.state_dtype.value} states")
    if training.activation_checkpointing != asked.activation_checkpointing:
        choice = training.activation_checkpointing
        found.append(
            f"activation checkpointing of the lowest {len(choice.layers)} layers only"
            if isinstance(choice, CheckpointedLayers)
            else f"{'full' if choice == 'full' else 'no'} activation checkpointing"
        )
    if training.update_in_backward and not asked.update_in_backward:
        found.append("updates in backward")
    if training.loss != asked.loss:
        found.append(f"{training.loss} loss")
    if training.micro_batch_size != asked.micro_batch_size:
        accumulated = training.gradient_accumulation_steps
        also = f", {accumulated} accumulated" if accumulated > 1 else ""
        found.append(f"micro-batches of {training.micro_batch_size}{also}")
    return ", ".join(found)


def _described(structure: ModelStructure, chunk: Chunk, training: TrainingSpec) -> str:
    """``chunk 0, the embedding,`` or ``chunk 3, layers 4 to 6,``."""
    if training.method == "full":
        return "all parameters"
    if training.method == "lora":
        return "the adapters"
    indices = [piece.index for piece in chunk.slices]
    layers = sorted({structure.layer_of[index] for index in indices} - {-1})
    numel_outside = sum(piece.numel for piece in chunk.slices if structure.layer_of[piece.index] < 0)
    place = ""
    if 2 * numel_outside > chunk.num_parameters:
        largest = max(chunk.slices, key=lambda piece: piece.numel).index
        place = ", the embedding," if structure.before_layers[largest] else ", the head,"
    elif layers:
        place = f", layer {layers[0]}," if len(layers) == 1 else f", layers {layers[0]} to {layers[-1]},"
    return f"chunk {chunk.index}{place}"
