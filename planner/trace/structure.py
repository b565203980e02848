"""What a plan needs to know of a model without building it: its stream and its parameters' layers. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from chunkplan.engine.spec import CheckpointedLayers, TrainingSpec
from chunkplan.engine.stream.chunks import Chunk, ParameterInfo, Slice
from chunkplan.planner.trace.step_trace import LayerRun, layer_runs


@dataclass(frozen=True, slots=True)
class ModelStructure:
    """The stream of a model, and its layers."""

    parameters: tuple[ParameterInfo, ...]
    """What is trained: all parameters, or adapters."""
    frozen: tuple[tuple[int, int], ...]
    """Elements and bytes of each parameter outside the stream: the weights under adapters."""
    layer_of: tuple[int, ...]
    """Layer index of each parameter; −1 when it belongs to none."""
    signatures: tuple[str, ...]
    """One per layer: equal for layers that compute the same (class, shapes, kind of attention)."""
    buffer_bytes: int
    before_layers: tuple[bool, ...]
    """For parameters outside the layers: true when the gradient reaches them through the layers (embeddings).
    """
    head: int
    """Index of the output projection; −1 when there is none."""
    loss_rows: int
    """Rows of the head whose logits the fused loss holds at once for their gradient; 0: it does not work by
    rows."""
    num_inputs: int
    """Tensors [batch, sequence] of int64 that make a micro-batch."""

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.signatures)

    @property
    def num_trainable_parameters(self) -> int:
        """Elements of the stream."""
        return sum(info.numel for info in self.parameters)

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters."""
        return self.num_trainable_parameters + sum(numel for numel, _ in self.frozen)

    @property
    def parameter_sizes(self) -> list[int]:
        """Bytes of each parameter."""
        return [*(info.num_bytes for info in self.parameters), *(size for _, size in self.frozen)]

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(self.parameter_sizes)

    def to_json(self) -> dict[str, Any]:
        """Plain values for the cache."""
        return {
            "parameters": [[p.name, p.shape, p.itemsize] for p in self.parameters],
            "frozen": self.frozen,
            "layer_of": self.layer_of,
            "signatures": self.signatures,
            "buffer_bytes": self.buffer_bytes,
            "before_layers": self.before_layers,
            "head": self.head,
            "loss_rows": self.loss_rows,
            "num_inputs": self.num_inputs,
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> ModelStructure:
        """Inverse of :meth:`to_json`."""
        return ModelStructure(
            tuple(ParameterInfo(name, tuple(shape), itemsize) for name, shape, itemsize in value["parameters"]),
            tuple((numel, size_bytes) for numel, size_bytes in value["frozen"]),
            tuple(value["layer_of"]),
            tuple(value["signatures"]),
            value["buffer_bytes"],
            tuple(value["before_layers"]),
            value["head"],
            value["loss_rows"],
            value["num_inputs"],
        )


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
