"""Exports a trained model as a Hugging Face folder: safetensors, configs, tokenizer and a model card."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from chunkplan.engine.export.adapter_folder import save_adapters
from chunkplan.engine.export.model_card import ModelCard
from chunkplan.engine.files import sha256_file, sync_path


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


@contextmanager
def _exportable(model: PreTrainedModel) -> Iterator[None]:
    """Turn the cache for generation on, and make the settings valid, for as long as the model is written."""
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
