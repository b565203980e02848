"""Paths that users name must lie, with every symbolic link followed, below a configured root."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from engine.errors import InputError

_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def resolve_below(field: str, given: str, roots: Iterable[Path]) -> Path:
    """The real path of ``given``; relative paths start at the working directory.

    Raises:
        InputError: outside the roots (said first, so that nothing outside them can be probed), or not there.
    """
    try:
        path = Path(given).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(field, f"not a path that can be followed: {error}") from error
    if not any(path.is_relative_to(root.resolve()) for root in roots):
        raise InputError(field, f"{given} is outside the folders that this service may read")
    try:
        exists = path.exists()
    except OSError as error:
        raise InputError(field, f"cannot read {given}: {error.strerror}") from error
    if not exists:
        raise InputError(field, f"{given} does not exist")
    return path


def resolve_model_folder(field: str, given: str, roots: list[Path]) -> Path:
    """The real path of a model folder none of whose files leads out of the roots.

    Raises:
        InputError: outside the roots, not there, or not a folder with a config.json.
    """
    folder = resolve_below(field, given, roots)
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise InputError(field, f"{given} is not a model folder: it has no config.json")
    resolved = [root.resolve() for root in roots]
    for pattern in _MODEL_FILES:
        for file in folder.glob(pattern):
            if not any(file.resolve().is_relative_to(root) for root in resolved):
                raise InputError(field, f"{given}: {file.name} leads outside the folders that this service may read")
    return folder
