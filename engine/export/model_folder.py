"""Exports a trained model as a Hugging Face folder: safetensors, configs, tokenizer and a model card."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from chunkplan.engine.files import sha256_file, sync_path
from chunkplan.engine.model.adapters import save_adapters

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


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """One file of an export; ``name`` is its path inside the folder."""

    name: str
    path: Path
    size_bytes: int
    sha256: str


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: ModelCard,
    adapter_base: str | None = None,
) -> list[ExportedFile]:
    """Write ``folder`` so that it is complete or absent: under a temporary name, synced, then renamed.

    Args:
        model: with its own parameter classes (no active chunk).
        tokenizer: goes with it, chat template included.
        folder: replaced if it exists.
        card: becomes README.md.
        adapter_base: write the model's adapters only, for the base model of this name.

    Returns:
        The files, sorted by name.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if adapter_base is not None:
        save_adapters(model, temporary, adapter_base)
    else:
        with _exportable(model):
            model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(card.render(), encoding="utf-8")
    for path in _files(temporary):
        path.chmod(0o644)
        sync_path(path)
    sync_path(temporary)
    _replace(temporary, folder)
    return [
        ExportedFile(path.relative_to(folder).as_posix(), path, path.stat().st_size, sha256_file(path))
        for path in _files(folder)
    ]


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


@contextmanager
def _exportable(model: PreTrainedModel) -> Iterator[None]:
    """For as long as the model is written: a cache for generation, which training turned off, and valid
    settings.
    """
    use_cache, generation = model.config.use_cache, getattr(model, "generation_config", None)
    model.config.use_cache = True
    if generation is not None:  # masked models generate nothing
        model.generation_config = _valid(generation)
    try:
        yield
    finally:
        model.config.use_cache = use_cache
        if generation is not None:
            model.generation_config = generation


def _valid(config: GenerationConfig) -> GenerationConfig:
    """Many published models set a temperature without sampling: read leniently, but refused when written."""
    sampling = copy.deepcopy(config)
    sampling.do_sample = True
    for candidate in (config, sampling):
        try:
            candidate.validate(strict=True)
        except ValueError:
            continue
        return candidate
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


def _replace(temporary: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    sync_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


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
    """Of what trained the model; what is not installed as a package is left out."""
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
