"""Exports a trained model as a Hugging Face folder: safetensors, configs, tokenizer and a model card."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from engine.files import sha256_file, sync_path

_MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What the exported folder's README.md says about the run."""

    name: str
    base_model: str
    """Name of the model that was fine-tuned."""
    method: str
    """``chunkft`` or ``full``."""
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

    def render(self) -> str:
        """Markdown with the front matter that model hubs read."""
        front = {
            "license": self.license,
            "base_model": self.base_model,
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["chunkplan", self.method],
        }
        facts = {
            "base model": self.base_model,
            "method": self.method,
            "parameters": f"{self.num_parameters:,}",
            "training rows": f"{self.num_train_rows:,}",
            "dataset (SHA-256)": f"`{self.dataset_sha256}`",
            "held-out loss before": _number(self.loss_before),
            "held-out loss after": _number(self.loss_after),
            "measured peak memory": f"{self.peak_allocated_bytes / _MEBIBYTE:,.1f} MiB allocated",
        }
        return "\n".join(
            [
                "---",
                *(f"{key}: {json.dumps(value)}" for key, value in front.items()),  # JSON is YAML
                "---",
                f"# {self.name}",
                "",
                f"All parameters of {self.base_model}, fine-tuned with chunkplan.",
                "",
                *_table("", facts),
                *_table("Schedule", self.schedule),
                *_table("Hyper-parameters", self.hyper_parameters),
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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: ModelCard
) -> list[ExportedFile]:
    """Write ``folder`` so that it is complete or absent: under a temporary name, synced, then renamed.

    Args:
        model: with its own parameter classes (no active chunk).
        tokenizer: goes with it, chat template included.
        folder: replaced if it exists.
        card: becomes README.md.

    Returns:
        The files, sorted by name.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
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
    """For as long as the model is written: a cache for generation, which training turned off, and valid settings."""
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
    return [*([f"## {title}", ""] if title else []), "| | |", "|---|---|", *rows, ""]


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
