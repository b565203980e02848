"""Finding a model's parts (layers, head, what the head is given) without a list of families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from chunkplan.engine.errors import InputError


def layer_lists(model: nn.Module) -> list[list[nn.Module]]:
    """Return the lists of repeated blocks, in the model's order: one, or an encoder's and a decoder's.

    A block is a module with parts, and a matrix in one of them; lists inside a block are its own business.
    """
    found: list[list[nn.Module]] = []
    inner: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inner:
            inner.update(module.modules())
            if len(module) and all(_is_block(item) for item in module):
                found.append(list(module))
    return found


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(p.dim() > 1 for p in module.parameters())


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """All repeated blocks of the network; indices of layers count these, an encoder's before a decoder's."""
    return [layer for layers in layer_lists(model) for layer in layers]


def head(model: nn.Module) -> nn.Linear:
    """The output projection onto the vocabulary."""
    find: Any = getattr(model, "get_output_embeddings", None)
    found = find() if find is not None else None
    if not isinstance(found, nn.Linear):
        raise InputError(
            "training.loss", f"'fused' needs a linear head, {type(model).__name__} has none; use 'standard'"
        )
    return found


class _HeadReached(Exception):
    """Ends a forward pass at the output projection."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def head_input(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return what the head is given, [batch, sequence, hidden size]; logits are never built.

    Raises:
        InputError: the model has no linear head, or does not call it.
    """
    projection = head(model)
    replaced = vars(projection).get("forward")

    def stop(hidden: Tensor) -> Tensor:
        raise _HeadReached(hidden)

    projection.forward = stop  # type: ignore[method-assign, assignment]
    try:
        model(**inputs)
    except _HeadReached as reached:
        return reached.hidden
    finally:
        if replaced is None:
            del projection.forward
        else:
            projection.forward = replaced  # type: ignore[method-assign]
    raise InputError("training.loss", f"'fused' needs a head that {type(model).__name__} calls; use 'standard'")
