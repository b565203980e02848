"""What each layer does in a step of one chunk, which decides the trace of that step. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from chunkplan.engine.spec import CheckpointedLayers, TrainingSpec
from chunkplan.engine.stream.chunks import Chunk, Slice
from chunkplan.planner.trace.layers import LayerRun, layer_runs
from chunkplan.planner.trace.structure import ModelStructure


@dataclass(frozen=True, slots=True)
class ChunkRoles:
    """What every layer does in a step of one chunk, and which parameters outside the layers are active."""

    layers: tuple[Hashable, ...]
    outside: tuple[tuple[int, int], ...]
    """Index in the stream, and what the trace depends on besides: see :func:`_cut_kind`."""

    @property
    def key(self) -> str:
        """Equal for chunks whose steps differ in nothing but the sizes of cut slices and the
        lengths of runs.
        """
        runs = [(self.layers[run.first], min(run.num_layers, 3)) for run in layer_runs(self.layers)]
        return repr((runs, self.outside))


def chunk_roles(structure: ModelStructure, chunk: Chunk, training: TrainingSpec) -> ChunkRoles:
    """Roles of all layers while ``chunk`` is active: below it without gradient, the lowest with one, those
    above.
    """
    active: dict[int, list[tuple[int, bool]]] = {}
    outside: list[tuple[int, int]] = []
    first_of_layer: dict[int, int] = {}
    for index, layer in enumerate(structure.layer_of):
        first_of_layer.setdefault(layer, index)
    for piece in chunk.slices:
        layer = structure.layer_of[piece.index]
        is_cut = piece.numel != structure.parameters[piece.index].numel
        if layer < 0:
            outside.append((piece.index, _cut_kind(structure, piece)))
        else:
            active.setdefault(layer, []).append((piece.index - first_of_layer[layer], is_cut))
    reaches_bottom = any(structure.before_layers[index] for index, _ in outside)
    lowest = -1 if reaches_bottom else min(active, default=structure.num_layers)
    checkpointing = training.activation_checkpointing
    roles = []
    for layer in range(structure.num_layers):
        if isinstance(checkpointing, CheckpointedLayers):
            is_checkpointed = layer in checkpointing.layers
        else:
            is_checkpointed = checkpointing == "full"
        position = (layer > lowest) - (layer < lowest)
        roles.append((structure.signatures[layer], position, is_checkpointed, tuple(active.get(layer, ()))))
    return ChunkRoles(tuple(roles), tuple(outside))


def stand_ins(structure: ModelStructure, chunk: Chunk, runs: Sequence[LayerRun]) -> list[tuple[int, ...]]:
    """For each slice of the chunk's trace, the ordinals of the chunk's slices that it stands for, layer by
    layer.

    Slices of repeated layers are traced once; all others stand for themselves.
    """
    of_layer: dict[int, list[int]] = {}
    for ordinal, piece in enumerate(chunk.slices):
        of_layer.setdefault(structure.layer_of[piece.index], []).append(ordinal)
    found = [(ordinal,) for ordinal in of_layer.get(-1, [])]
    for run in runs:
        layer = run.first
        for repeat in run.repeats:
            found += zip(*(of_layer.get(real, []) for real in range(layer, layer + repeat)), strict=True)
            layer += repeat
    return sorted(found)


def _cut_kind(structure: ModelStructure, piece: Slice) -> int:
    """0 for a whole parameter; −1 for a cut one of which only the gradient follows the cut; else the rows
    that decide.

    The fused loss holds temporaries as large as the head's active rows, up to a limit; a tied head has two
    gradients.
    """
    info = structure.parameters[piece.index]
    if piece.numel == info.numel:
        return 0
    rows = piece.numel // info.row_numel
    if piece.index != structure.head:
        return -1
    if structure.before_layers[piece.index]:
        return rows
    return min(rows, structure.loss_rows) or -1
