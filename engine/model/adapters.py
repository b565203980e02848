"""Low-rank adapters of peft on a frozen model, for the engine's own loop.

The adapters are put into the model in place: it stays the transformers model that it was, so that its
backbone, layers and head are found as ever. peft freezes the base; a stream of only what is trainable is then
all that LoRA needs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from chunkplan.engine.errors import InputError
from chunkplan.engine.model.tasks import Task, task_of
from chunkplan.engine.spec import LoraSpec

_TASK_TYPES = {Task.CAUSAL: "CAUSAL_LM", Task.SEQ2SEQ: "SEQ_2_SEQ_LM"}
"""peft's names, which decide the class that it wraps a model in; masked models have none and need none."""


def add_adapters(model: PreTrainedModel, spec: LoraSpec) -> None:
    """Freeze the model and give it trainable adapters in fp32, as peft does by default; B starts at zero.

    Raises:
        InputError: no module has a name of ``target_modules``, or one of them cannot have an adapter.
    """
    with _without_bitsandbytes():
        _add_adapters(model, spec)


def _add_adapters(model: PreTrainedModel, spec: LoraSpec) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    targets = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=int(spec.alpha) if spec.alpha.is_integer() else spec.alpha,  # other readers expect an integer
        lora_dropout=spec.dropout,
        target_modules=targets,
        task_type=_TASK_TYPES.get(task_of(model)),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about settings of layers that peft corrects by itself
            with next(model.parameters()).device:
                inject_adapter_in_model(config, model)
    except ValueError as error:
        raise InputError("training.lora.target_modules", str(error).splitlines()[0]) from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


@contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """Keep peft from loading bitsandbytes, which it does in case a model were made of its layers; none is.

    It takes 45 MB of host memory, which a plan would have to know of.
    """
    if "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment] # which is how Python says: there is none
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]


def adapter_rate_factor(spec: LoraSpec, name: str) -> float:
    """Learning rate of an adapter's parameter over that of A's."""
    return spec.lr_ratio if ".lora_B." in name or ".lora_embedding_B." in name else 1.0


def merge_adapters(model: PreTrainedModel) -> None:
    """Add every adapter to its weight and take it out: the model is a plain one again, all of it tuned."""
    from peft.tuners.lora import LoraLayer

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer):
                child.merge()
                setattr(parent, name, child.get_base_layer())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    del model.peft_config
