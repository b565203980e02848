"""What a plan needs to know of a model without building it: its stream and its parameters' layers. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chunkplan.engine.stream.chunks import ParameterInfo


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
