"""The model card of an exported folder: what a reader and a model hub want to know of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_MEBIBYTE = 1 << 20
_MAX_LOSSES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What the exported folder's README.md says about the run."""

    name: str
    base_model: str
    """Name of the model that was fine-tuned."""
    method: str
    """``chunkft``, ``full`` or ``lora``."""
    schedule: Mapping[str, object]
    """The chunk schedule, option by option."""
    hyper_parameters: Mapping[str, object]
    """Everything else that was asked for: rates, lengths, batch, seed."""
    dataset_sha256: str
    num_train_rows: int
    num_parameters: int
    peak_allocated_bytes: int
    """Highest allocated memory that was measured."""
    loss_before: float | None
    """Held-out loss of the base model; None without held-out data."""
    loss_after: float | None
    license: str = "other"
    """SPDX-like id in lower case, as the base model's card gives it."""
    pipeline_tag: str = "text-generation"
    """What hubs call the model's task."""
    is_adapter: bool = False
    """The folder holds an adapter of the base model, not a model."""
    adapter: Mapping[str, object] = field(default_factory=dict)
    """Rank and so on, with method ``lora``."""
    dataset_name: str | None = None
    """Name of the data file, without its folder."""
    num_trainable_parameters: int | None = None
    """Default: all."""
    predicted_peak_bytes: int | None = None
    """What the job's plan said of the highest allocated memory."""
    held_out_losses: Sequence[tuple[int, float]] = ()
    """(update, held-out loss after it)."""
    training_losses: Sequence[tuple[int, float]] = ()
    """(last update of a span, mean training loss in the span)."""

    def render(self) -> str:
        """Markdown with the front matter that model hubs read."""
        front = {
            "license": self.license,
            "base_model": self.base_model,
            "library_name": "peft" if self.is_adapter else "transformers",
            "pipeline_tag": self.pipeline_tag,
            "tags": ["chunkplan", self.method],
        }
        trainable = self.num_trainable_parameters
        facts = {
            "base model": self.base_model,
            "method": self.method,
            "parameters": f"{self.num_parameters:,}",
            "trained parameters": f"{self.num_parameters if trainable is None else trainable:,}",
            "data file": self.dataset_name,
            "training rows": f"{self.num_train_rows:,}",
            "dataset (SHA-256)": f"`{self.dataset_sha256}`",
            "held-out loss before": _number(self.loss_before),
            "held-out loss after": _number(self.loss_after),
            "measured peak memory": _allocated(self.peak_allocated_bytes),
            "predicted peak memory": _allocated(self.predicted_peak_bytes),
        }
        if self.is_adapter:
            what = f"A LoRA adapter of {self.base_model}, trained with chunkplan."
        elif self.adapter:
            what = f"{self.base_model} with a LoRA adapter merged into its weights, trained with chunkplan."
        else:
            what = f"All parameters of {self.base_model}, fine-tuned with chunkplan."
        return "\n".join(
            [
                "---",
                *(f"{key}: {json.dumps(value)}" for key, value in front.items()),  # JSON is YAML
                "---",
                f"# {self.name}",
                "",
                what,
                "",
                *_table("", facts),
                *_losses("Held-out loss", "after update", _thinned(self.held_out_losses)),
                *_losses("Training loss", "mean up to update", self.training_losses),
                *_table("Schedule", self.schedule),
                *_table("Adapter", self.adapter),
                *_table("Hyper-parameters", self.hyper_parameters),
                *_table("Versions", _versions()),
            ]
        )


def base_license(folder: Path) -> str:
    """The licence that a model folder's own card names; ``other`` where it names none."""
    card = folder / "README.md"
    if not card.is_file():
        return "other"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if lines[:1] != ["---"]:
        return "other"
    for line in lines[1:]:
        if line == "---":
            break
        key, _, value = line.partition(":")
        if key == "license" and value.strip():
            return value.strip().strip("\"'")
    return "other"


def _table(title: str, values: Mapping[str, object]) -> list[str]:
    rows = [f"| {key} | {value} |" for key, value in values.items() if value is not None]
    return [*([f"## {title}", ""] if title else []), "| | |", "|---|---|", *rows, ""] if rows else []


def _losses(title: str, when: str, losses: Sequence[tuple[int, float]]) -> list[str]:
    rows = [f"| {update:,} | {loss:.4f} |" for update, loss in losses]
    return [f"## {title}", "", f"| {when} | loss |", "|---:|---:|", *rows, ""] if rows else []


def _thinned(losses: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most :data:`_MAX_LOSSES` of them, evenly, with the first and the last."""
    last = len(losses) - 1
    if last < _MAX_LOSSES:
        return list(losses)
    return [losses[round(i * last / (_MAX_LOSSES - 1))] for i in range(_MAX_LOSSES)]


def _versions() -> dict[str, str]:
    """Return versions of what trained the model, but for what is not installed as a package."""
    found = {}
    for name in ("chunkplan", "torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _allocated(size_bytes: int | None) -> str | None:
    return None if size_bytes is None else f"{size_bytes / _MEBIBYTE:,.1f} MiB allocated"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
