"""What decides the operations of one training step, besides model, chunk and batch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from chunkplan.engine.spec.base import SpecModel
from chunkplan.engine.spec.choices import Optimizer


class CheckpointedLayers(SpecModel):
    """Checkpoint only the named layers (indices into the model's layer list)."""

    layers: list[Annotated[int, Field(ge=0)]]
    """Indices of the layers whose activations are recomputed, from 0."""


class StepSpec(SpecModel):
    """The options of a training step: what is computed, how the active chunk is updated, and when."""

    packing: bool = False
    """Short rows share a sequence of ``seq_len`` tokens without seeing each other."""
    autocast: Literal["none", "bf16", "fp16"] = "none"
    """Data type of matrix products and the like, for fp32 weights."""
    optimizer: Optimizer = Optimizer.ADAMW
    """Rule that updates the active chunk: adamw, adamw8bit, adafactor, lion, sgd, adagrad or rmsprop."""
    activation_checkpointing: Literal["full", "none"] | CheckpointedLayers = "full"
    """Activations that backward recomputes: ``full``, ``none``, or those of chosen layers."""
    loss: Literal["fused", "standard"] = "fused"
    """``fused`` never holds the logits of a whole batch; ``standard`` is the model's own."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the active chunk's gradients to this total norm; ``null`` turns clipping off."""
    update_in_backward: bool = False
    """Update each slice as soon as its gradient is complete, and free it; needs ``max_grad_norm: null``."""
