"""The ordered stream over a live model's unique parameters."""

from __future__ import annotations

from torch import nn

from chunkplan.engine.stream.chunks import Chunk, ParameterInfo
from chunkplan.engine.stream.chunks import partition as partition_parameters


class ParameterStream:
    """A model's unique parameters (tied ones once), in ``named_parameters()`` order, as one sequence of
    bytes.

    Args:
        model: any module.
        only_trainable: leave out the parameters that require no gradient now: base weights under adapters.
    """

    def __init__(self, model: nn.Module, *, only_trainable: bool = False) -> None:
        named = [item for item in model.named_parameters() if item[1].requires_grad or not only_trainable]
        self.names: list[str] = [name for name, _ in named]
        self.parameters: list[nn.Parameter] = [parameter for _, parameter in named]
        self.infos: list[ParameterInfo] = [
            ParameterInfo(name, tuple(parameter.shape), parameter.element_size()) for name, parameter in named
        ]

    @property
    def num_parameters(self) -> int:
        """Number of elements of all parameters."""
        return sum(info.numel for info in self.infos)

    @property
    def num_bytes(self) -> int:
        """Size of all parameters in bytes."""
        return sum(info.num_bytes for info in self.infos)

    def partition(self, num_chunks: int) -> list[Chunk]:
        """Cut the stream into chunks, by the rules of :func:`chunkplan.engine.stream.chunks.partition`."""
        return partition_parameters(self.infos, num_chunks)
