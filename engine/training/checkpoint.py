"""Checkpoints: complete or absent, checked when read, incremental by chunk.

A checkpoint is a folder ``step-XXXXXXXX``: one safetensors file per chunk that was ever updated (weights and
optimizer states of its slices), and ``manifest.json`` with the position, the random states, every file's size
and SHA-256, and its own. It is written under a temporary name, synced, and renamed.

Files of chunks that did not change are hard links to the same files of the checkpoints that this one
replaces. So an unchanged chunk is not written again, and yet no two checkpoints that are kept share a file:
damage hits one of them.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from chunkplan.engine.files import sha256_file, sha256_text, sync_path
from chunkplan.engine.optimizer.loss_scale import LossScale
from chunkplan.engine.optimizer.state_transfer import BlockKey, ChunkStates, States, host_like
from chunkplan.engine.training.chunkft import ChunkFT

_FORMAT = 1
_EXPANSION = "expansion.safetensors"
_MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or belongs to another run; the message says what is wrong with which file."""


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """What was written: where, how much, and the digest of its manifest."""

    step: int
    path: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """Says where training goes on, after update ``step`` with its notes, and which checkpoints were passed
    over.
    """

    step: int
    notes: dict[str, Any]
    passed_over: list[str]


def save_checkpoint(
    tuner: ChunkFT, folder: Path, fingerprint: str, notes: dict[str, Any], keep: int = 2
) -> SavedCheckpoint:
    """Write the tuner's state as ``folder/step-XXXXXXXX``; remove older checkpoints beyond ``keep``.

    Args:
        tuner: between two updates.
        folder: where the run's checkpoints live.
        fingerprint: digest of everything that must be the same on resume (model, data, training spec).
        notes: the caller's own JSON values, given back on resume.
        keep: complete checkpoints to leave, this one included.
    """
    tuner.optimizer.settle()
    final = folder / f"step-{tuner.num_updates:08d}"
    temporary = folder / f".{final.name}.partial"
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    replaced = [path for path in _complete(folder) if path != final][keep - 1 :]
    previous = _files_of(replaced)
    files: dict[str, dict[str, Any]] = {}
    for index, states in _changed_chunks(tuner):
        name = f"chunk-{index:05d}.safetensors"
        known, where = previous.get(name, ({}, folder))
        if known.get("last_update") == states.last_update:
            _link(where / name, temporary / name)
            files[name] = known
        else:
            save_file(_chunk_tensors(tuner, index, states), temporary / name)
            about = {"chunk_index": index, "num_updates": states.num_updates, "last_update": states.last_update}
            files[name] = about | _describe(temporary / name)
    if tuner.expansion is not None:
        save_file(tuner.expansion.state_dict(), temporary / _EXPANSION)
        files[_EXPANSION] = _describe(temporary / _EXPANSION)
    manifest = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "num_updates": tuner.num_updates,
        "loss_scale": tuner.loss_scale.state() if tuner.loss_scale is not None else None,
        "notes": notes,
        "random_states": _random_states(),
        "files": files,
    }
    (temporary / _MANIFEST).write_text(json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1))
    sync_path(temporary / _MANIFEST)
    sync_path(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync_path(folder)
    for old in replaced:
        shutil.rmtree(old)
    size_bytes = sum(int(entry["size_bytes"]) for entry in files.values())
    return SavedCheckpoint(tuner.num_updates, final, size_bytes, sha256_file(final / _MANIFEST))


def resume(tuner: ChunkFT, folder: Path, fingerprint: str) -> Resumed:
    """Load the newest whole checkpoint into a tuner built on the base model; step 0 when there is none.

    Raises:
        CheckpointError: the newest whole checkpoint belongs to another run.
    """
    passed_over: list[str] = []
    for candidate in _complete(folder):
        try:
            manifest = _checked_manifest(candidate)
        except CheckpointError as damage:
            passed_over.append(str(damage))
            # Out of the way of later checkpoints, which would link to its files and count it as kept.
            candidate.rename(folder / f".{candidate.name}.damaged")
            continue
        if manifest["fingerprint"] != fingerprint:
            raise CheckpointError(f"{candidate.name} was written with another model, data set or training spec")
        for name, entry in manifest["files"].items():
            if name != _EXPANSION:
                _load_chunk(tuner, candidate / name, entry)
            elif tuner.expansion is not None:
                tuner.expansion.load_state_dict(load_file(candidate / name))
        tuner.num_updates = int(manifest["num_updates"])
        if tuner.loss_scale is not None:
            tuner.loss_scale = LossScale(**manifest["loss_scale"])
        _restore_random_states(manifest["random_states"])
        return Resumed(tuner.num_updates, manifest["notes"], passed_over)
    return Resumed(0, {}, passed_over)


def _changed_chunks(tuner: ChunkFT) -> list[tuple[int, ChunkStates]]:
    """Return the chunks whose weights differ from the base model's: with expansion all, just now."""
    chunks = tuner.optimizer.chunks
    if tuner.expansion is None:
        return sorted(chunks.items())
    for index in range(len(tuner.chunks)):
        chunks.setdefault(index, ChunkStates()).last_update = tuner.num_updates - 1
    return sorted(chunks.items())


def _files_of(checkpoints: list[Path]) -> dict[str, tuple[dict[str, Any], Path]]:
    """Entry and folder of each file of the checkpoints, newest first, that can be read."""
    found: dict[str, tuple[dict[str, Any], Path]] = {}
    for path in checkpoints:
        try:
            files = _read_manifest(path)["files"]
        except CheckpointError:
            continue
        for name, entry in files.items():
            found.setdefault(name, (entry, path))
    return found


def _link(source: Path, target: Path) -> None:
    """A hard link; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync_path(target)


def _complete(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first: they get this name when everything is in them."""
    return sorted(folder.glob("step-*"), key=lambda path: path.name, reverse=True)


def _digest(manifest: dict[str, Any]) -> str:
    return sha256_text(json.dumps(manifest, sort_keys=True))


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name}: its manifest cannot be read") from error
    if manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{path.name}: format {manifest.get('format')!r} is not {_FORMAT}")
    if manifest.pop("sha256", None) != _digest(manifest):
        raise CheckpointError(f"{path.name}: its manifest is damaged")
    return manifest


def _checked_manifest(path: Path) -> dict[str, Any]:
    manifest = _read_manifest(path)
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["size_bytes"] or sha256_file(file) != entry["sha256"]:
            raise CheckpointError(f"{path.name}: {name} is damaged or missing")
    return manifest


def _describe(file: Path) -> dict[str, Any]:
    sync_path(file)
    return {"size_bytes": file.stat().st_size, "sha256": sha256_file(file)}


def _chunk_tensors(tuner: ChunkFT, index: int, states: ChunkStates) -> dict[str, Tensor]:
    """The chunk's weights, and its states from wherever they are now."""
    tensors: dict[str, Tensor] = {}
    for ordinal, piece in enumerate(tuner.chunks[index].slices):
        flat = tuner.stream.parameters[piece.index].detach().view(-1)
        tensors[f"weight.{ordinal}"] = flat[piece.start : piece.stop].cpu()
    for (ordinal, begin), kept in {**states.host, **states.device}.items():
        for name, tensor in kept.items():
            tensors[f"{name}.{ordinal}.{begin}"] = tensor.cpu()
    return tensors


def _load_chunk(tuner: ChunkFT, file: Path, entry: dict[str, Any]) -> None:
    index = int(entry["chunk_index"])
    tensors = load_file(file)
    states = ChunkStates(int(entry["num_updates"]), int(entry["last_update"]))
    device = tuner.stream.parameters[0].device
    for ordinal, piece in enumerate(tuner.chunks[index].slices):
        flat = tuner.stream.parameters[piece.index].detach().view(-1)
        flat[piece.start : piece.stop].copy_(tensors[f"weight.{ordinal}"])
    kept: dict[BlockKey, States] = {}
    for name, tensor in tensors.items():
        kind, *key = name.split(".")
        if kind != "weight":
            home = host_like(tensor.to(device))
            kept.setdefault((int(key[0]), int(key[1])), {})[kind] = home.copy_(tensor)
    states.host = kept
    tuner.optimizer.chunks[index] = states


def _random_states() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: bytes(state.tolist()).hex() for name, state in states.items()}


def _restore_random_states(states: dict[str, str]) -> None:
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(states["cpu"])), dtype=torch.uint8))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(states["cuda"])), dtype=torch.uint8))
