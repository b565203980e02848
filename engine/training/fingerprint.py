"""What must be the same for a run to resume from a checkpoint: model, data, and how it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import to_json

from chunkplan.engine.files import sha256_text
from chunkplan.engine.spec import ResolvedJobTraining, SpecModel
from chunkplan.engine.stream.chunks import ParameterInfo

_MAY_CHANGE = {"checkpoint_every", "checkpoints_to_keep", "eval_every"}
"""Fields that decide nothing about the weights."""
_FIRST_FIELDS = (
    "method", "seq_len", "micro_batch_size", "gradient_accumulation_steps", "packing", "precision", "autocast",
    "optimizer", "activation_checkpointing", "loss", "attention", "weights", "schedule", "max_grad_norm",
    "update_in_backward", "lora", "learning_rate", "expansion_learning_rate", "lr_schedule", "lr_schedule_by",
    "warmup_ratio", "weight_decay", "max_steps", "epochs", "seed",
)  # fmt: skip
_FIRST_FIELDS_OF_SCHEDULE = ("num_chunks", "order", "switch_every", "states", "state_dtype", "master", "expansion")
"""Fields of the specs of version 0.1.0, in the order in which they were written.

A field that came later counts only where it differs from its default: a checkpoint that was written before
there was such a field goes on.
"""


def fingerprint(training: ResolvedJobTraining, infos: Sequence[ParameterInfo], data_sha256: str) -> str:
    """Return the digest of a training spec, the shapes of a stream and the digest of a data set."""
    written = _as_written(training, _FIRST_FIELDS)
    written["schedule"] = _as_written(training.schedule, _FIRST_FIELDS_OF_SCHEDULE)
    shapes = repr([(info.name, info.shape) for info in infos])
    return sha256_text("\n".join([to_json(written).decode(), shapes, data_sha256]))


def _as_written(spec: SpecModel, first: Sequence[str]) -> dict[str, Any]:
    values = spec.model_dump(mode="json", exclude=_MAY_CHANGE)
    later = (name for name in sorted(values) if name not in first)
    changed = [
        name
        for name in later
        if getattr(spec, name) != type(spec).model_fields[name].get_default(call_default_factory=True)
    ]
    return {name: values[name] for name in (*first, *changed)}
