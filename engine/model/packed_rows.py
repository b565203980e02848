"""Whether a model keeps packed rows apart. Nothing here knows about families: the model is asked.

Packed rows differ from one long row in their positions alone, which start again from 0 at every row. Models
that build their attention mask from positions keep the rows apart; others ignore them, or carry a state
across.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from chunkplan.engine.data.tokens import IGNORE_INDEX
from chunkplan.engine.errors import InputError
from chunkplan.engine.model.tasks import Task, task_of

_FIRST, _SECOND = 5, 6

LossOf = Callable[[Mapping[str, Tensor]], Tensor]


def check_isolation(model: nn.Module, loss_of: LossOf) -> None:
    """Pack two rows of a few tokens, and look for the first one in the second one's loss.

    Args:
        model: is left as it was.
        loss_of: the sum of a batch's token losses; the batch holds ``input_ids``, ``labels``, and
            ``position_ids`` where rows are packed.

    Raises:
        InputError: the second row's loss has a gradient with respect to the first row, which is exactly zero
            where attention is masked, or differs from its loss when it is alone.
    """
    check_packable(model)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Module):
        raise _refusal(model, "has no input embedding to check packing by")
    device = next(model.parameters()).device
    vocab_size = next(embedding.parameters()).shape[0]
    ids = torch.arange(3, 3 + _FIRST + _SECOND, device=device).remainder_(vocab_size)[None]
    labels = ids.clone()
    labels[:, : _FIRST + 1] = IGNORE_INDEX
    positions = torch.cat([torch.arange(_FIRST), torch.arange(_SECOND)]).to(device)[None]
    with _frozen(model), _embedded(embedding) as embedded:
        try:
            packed = loss_of({"input_ids": ids, "labels": labels, "position_ids": positions})
        except (TypeError, ValueError) as error:
            raise _refusal(model, "takes no position ids") from error
        if not embedded:
            raise _refusal(model, "does not call its input embedding, which packing is checked by")
        gradients = torch.autograd.grad(packed, embedded, allow_unused=True)
        with torch.no_grad():
            alone = loss_of({"input_ids": ids[:, _FIRST:], "labels": labels[:, _FIRST:]})
    if any(gradient is not None and bool(gradient[:, :_FIRST].any()) for gradient in gradients):
        raise would_meet(model)
    tolerance = 1e-4 if packed.dtype == torch.float32 == next(model.parameters()).dtype else 5e-2
    if not torch.isclose(packed, alone, rtol=tolerance, atol=tolerance):
        raise _refusal(model, "does not start each row at its own position 0")


def check_packable(model: nn.Module) -> None:
    """Raises InputError for a model whose task has no packed form."""
    if task_of(model) is not Task.CAUSAL:
        raise _refusal(model, "is not a causal model, and only those can be packed")


def would_meet(model: nn.Module) -> InputError:
    """The refusal of a model that does not keep rows apart."""
    return _refusal(model, "lets rows of one sequence see each other")


def _refusal(model: nn.Module, problem: str) -> InputError:
    return InputError("training.packing", f"{type(model).__name__} {problem}; use packing false")


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, its parameters without gradients."""
    was_training, flags = model.training, [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.train(was_training)


@contextmanager
def _embedded(embedding: nn.Module) -> Iterator[list[Tensor]]:
    """What the embedding puts out, as leaves that take gradients."""
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        outputs.append(output.detach().requires_grad_(True))
        return outputs[-1]

    handle = embedding.register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()
