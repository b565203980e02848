"""One resolved job as the engine runs it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from chunkplan.engine.spec.base import SpecModel
from chunkplan.engine.spec.training import AskedJobTraining


class RunSpec(SpecModel):
    """One resolved job as the engine runs it, the worker's job.json: local paths, a schedule, a device."""

    job_id: str
    name: str
    model_path: str
    model_name: str = ""
    """For the model card and adapters: a Hugging Face name where there is one; default: the folder's name."""
    dataset_path: str
    dataset_name: str = ""
    """For the model card; default: the file's name."""
    dataset_format: Literal["auto", "messages", "prompt_completion", "instruction", "text"] = "auto"
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    validation_path: str | None = None
    """Evaluated on instead of held-out rows."""
    training: AskedJobTraining
    output_name: str
    merge: bool = False
    predicted_peak_bytes: int | None = None
    """Allocated bytes at the peak as planned; for the model card."""
    device: str = "cpu"
    """``cpu`` or ``cuda:N``."""
