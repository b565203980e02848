"""Gradients of one chunk only: whole tensors by autograd as it is, cut tensors by sliced functions.

While a chunk is active, every parameter outside it is frozen, so backpropagation stops below the lowest
active layer. Identity, ties and state_dict keys of every parameter stay what they are;
chunkplan.engine.gradients.cut_parameter says what happens to a cut one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chunkplan.engine.gradients.cut_parameter import CutParameter, RowRange
from chunkplan.engine.stream.chunks import Chunk, matrix_shape
from chunkplan.engine.stream.parameters import ParameterStream

__all__ = ["Activation", "ActiveSlice", "CutParameter", "activate"]

_MARK = "chunk_is_active"
"""Attribute of every parameter of an active chunk."""


@dataclass(frozen=True, slots=True)
class ActiveSlice:
    """The flat range [start, stop) of a parameter that has a gradient now."""

    name: str
    start: int
    stop: int
    tensor: Tensor
    """1-D leaf of ``stop - start`` elements in the parameter's storage; its ``grad`` is the range's gradient.

    It is the only place where the gradient lives: ``parameter.grad`` stays None.
    """
    parameter: nn.Parameter

    @property
    def num_columns(self) -> int:
        """Length of the parameter's last dimension, 1 for a vector: the slice is a matrix with so many
        columns.
        """
        return matrix_shape(self.parameter.shape)[1]

    def release_gradient(self) -> None:
        """Drop the gradient and its memory."""
        self.tensor.grad = None
        self.parameter.grad = None


class GradientWatcher(Protocol):
    """Whoever wants the gradients of parameters outside the active chunk, where they pass by anyway."""

    def watch(self, name: str, parameter: nn.Parameter) -> RemovableHandle:
        """Make a parameter trainable, and take every complete gradient of it, until the handle is removed."""


class Activation:
    """Context manager in which exactly one chunk of a model has gradients.

    ``on_gradient`` is called with a slice and its ordinal as soon as its gradient is complete, within
    backward. With an expansion, the parameters above the chunk take part in the backward passes for which
    :meth:`expand` says so.

    It must stay open until backward has ended (recomputation under checkpointing needs it too). On exit the
    parameters' classes, ``requires_grad`` flags and gradients are what they were before.
    """

    def __init__(
        self,
        stream: ParameterStream,
        chunk: Chunk,
        watcher: GradientWatcher | None = None,
        on_gradient: Callable[[int, ActiveSlice], None] | None = None,
    ) -> None:
        self._stream = stream
        self._watcher = watcher
        self._expanded: list[nn.Parameter] = []
        self._on_gradient = on_gradient
        self._chunk = chunk
        self._was_trainable: list[bool] = []
        self._before: list[tuple[type[nn.Parameter], Tensor | None]] = []
        self._hooks: list[RemovableHandle] = []
        self.slices: list[ActiveSlice] = []

    def __enter__(self) -> list[ActiveSlice]:
        """Freeze everything outside the chunk; return the chunk's slices in stream order."""
        parameters = self._stream.parameters
        if any(hasattr(parameter, _MARK) for parameter in parameters):
            raise RuntimeError("another chunk of this model is active: leave it before activating this one")
        self._was_trainable = [parameter.requires_grad for parameter in parameters]
        for parameter in parameters:
            parameter.requires_grad_(False)
        for piece in self._chunk.slices:
            parameter = parameters[piece.index]
            self._before.append((type(parameter), parameter.grad))
            parameter.grad = None
            setattr(parameter, _MARK, True)
            leaf = parameter.detach().view(-1)[piece.start : piece.stop].requires_grad_(True)
            active = ActiveSlice(self._stream.names[piece.index], piece.start, piece.stop, leaf, parameter)
            arrived = self._arrival(len(self.slices), active)
            if piece.numel == parameter.numel():
                self._activate_whole(parameter, leaf, arrived)
            else:
                row_numel = parameter.numel() // parameter.shape[0]
                rows = RowRange(leaf, parameter.detach(), piece.start // row_numel, piece.stop // row_numel)
                _become(parameter, CutParameter)
                parameter.rows = rows  # type: ignore[attr-defined]
                self._hooks.append(leaf.register_post_accumulate_grad_hook(arrived))
            self.slices.append(active)
        if self._watcher is not None:
            self._expand(self._watcher)
        return self.slices

    def _expand(self, watcher: GradientWatcher) -> None:
        """Let the parameters above the chunk, where the gradient passes anyway, take part."""
        inside = {piece.index for piece in self._chunk.slices}
        for index in range(min(inside), len(self._stream.parameters)):
            if index not in inside:
                self._expanded.append(self._stream.parameters[index])
                self._hooks.append(watcher.watch(self._stream.names[index], self._stream.parameters[index]))

    def expand(self, is_on: bool) -> None:
        """Let the parameters above the chunk take part in the next backward pass, or not."""
        for parameter in self._expanded:
            parameter.requires_grad_(is_on)

    def _arrival(self, ordinal: int, active: ActiveSlice) -> Callable[[Tensor], None]:
        """Return what to do when all of a backward pass's contributions to the slice's gradient are there."""

        def arrived(_: Tensor) -> None:
            if self._on_gradient is not None:
                self._on_gradient(ordinal, active)

        return arrived

    def _activate_whole(self, parameter: nn.Parameter, leaf: Tensor, arrived: Callable[[Tensor], None]) -> None:
        def move_gradient(owner: Tensor) -> None:
            assert owner.grad is not None
            gradient, owner.grad = owner.grad.view(-1), None
            leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)
            del gradient
            arrived(leaf)

        parameter.requires_grad_(True)
        self._hooks.append(parameter.register_post_accumulate_grad_hook(move_gradient))

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Restore every parameter; gradients stay with the slices' tensors only."""
        for hook in self._hooks:
            hook.remove()
        for active, (original, gradient) in zip(self.slices, self._before, strict=True):
            parameter = active.parameter
            delattr(parameter, _MARK)
            if isinstance(parameter, CutParameter):
                del parameter.rows
                _become(parameter, original)
            parameter.grad = gradient
        for parameter, was_trainable in zip(self._stream.parameters, self._was_trainable, strict=True):
            parameter.requires_grad_(was_trainable)
        self._hooks, self._before, self._expanded, self.slices = [], [], [], []


def _become(parameter: nn.Parameter, kind: type[nn.Parameter]) -> None:
    parameter.__class__ = kind


def activate(model: nn.Module, chunk: Chunk, stream: ParameterStream | None = None) -> Activation:
    """Make one chunk the only part of ``model`` with gradients: ``with activate(model, chunk) as active:``.

    Args:
        model: any module whose stream ``chunk`` was cut from.
        chunk: from ``ParameterStream(model).partition(...)``.
        stream: the model's stream, to spare building it again.
    """
    return Activation(stream or ParameterStream(model), chunk)
