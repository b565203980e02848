"""The methods that chunkplan is compared with, each as a function that does one update of a model.

All share the engine's forward and backward pass (fused loss, checkpointing as asked), so that what differs is
the method. BAdam and GaLore are their authors' packages, unchanged.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from chunkplan.engine import ChunkFT
from chunkplan.engine.spec import StepSpec
from chunkplan.engine.training.step import Observer, forward_backward, num_counted_tokens

Update = Callable[[int, dict[str, Tensor]], None]
"""``update(number, batch)``: the update's number decides the learning rate."""


def chunkft(model: nn.Module, rate: Callable[[int], float], observer: Observer, **options: Any) -> Update:
    """The engine; ``options`` are ChunkFT's."""
    tuner = ChunkFT(model, lr=rate, observer=observer, **options)

    def update(number: int, batch: dict[str, Tensor]) -> None:
        tuner.backward(batch)
        tuner.step()

    return update


def usual_loop(
    model: nn.Module,
    optimizer: Any,
    rate: Callable[[int], float],
    observer: Observer,
    options: StepSpec,
    max_grad_norm: float | None = 1.0,
) -> Update:
    """Backward, clip, step, with all gradients at once."""

    def update(number: int, batch: dict[str, Tensor]) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate(number)
        forward_backward(model, batch, num_counted_tokens(batch["labels"]), options, observer)
        with observer.phase("optimizer"):
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    return update


def trained(model: nn.Module) -> Iterable[nn.Parameter]:
    """Parameters that have gradients."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Dense AdamW."""
    return torch.optim.AdamW(trained(model), weight_decay=0.0, fused=True)


def adafactor(model: nn.Module) -> torch.optim.Optimizer:
    """Dense Adafactor of transformers with an outer learning rate and no momentum."""
    from transformers.optimization import Adafactor

    return Adafactor(trained(model), lr=1e-3, scale_parameter=False, relative_step=False)


def lora(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW on adapters of rank 16 in every linear layer but the head; changes the model."""
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    return adamw(model)


def badam(model: nn.Module) -> Any:
    """BAdam 1.4: a block per layer, embedding and head are blocks too; every update another
    block, at random.
    """
    from badam import BlockOptimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that fp32 weights need more memory than bf16 ones
        return BlockOptimizer(
            base_optimizer=torch.optim.AdamW(model.parameters(), weight_decay=0.0),
            named_parameters_list=list(model.named_parameters()),
            switch_block_every=1,
            switch_mode="random",
            include_embedding=True,
            include_lm_head=True,
            verbose=0,
        )


def galore(model: nn.Module) -> Any:
    """GaLore 1.0: AdamW on gradients of the layers' matrices projected to rank 128, a new projection every
    200.
    """
    from galore_torch import GaLoreAdamW

    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    inside = {id(p) for p in matrices}
    projected = {"params": matrices, "rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    others = {"params": [p for p in model.parameters() if id(p) not in inside]}
    return GaLoreAdamW([others, projected], lr=1e-3, no_deprecation_warning=True)


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "adamw": adamw,
    "adafactor": adafactor,
    "lora": lora,
    "badam": badam,
    "galore": galore,
}


def linear_decay(peak: float, num_updates: int, cycle_length: int = 1) -> Callable[[int], float]:
    """A rate that falls linearly by cycle to the end; a cycle of one update is the usual schedule."""
    num_cycles = math.ceil(num_updates / cycle_length)
    return lambda update: peak * (1.0 - (update // cycle_length) / num_cycles)
