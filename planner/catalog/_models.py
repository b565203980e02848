"""The model catalog: architecture facts by name, from a local folder, or inline."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import ModelConfig, ModelPath, ModelRef
from chunkplan.planner.catalog._config import causal_lm_class, check_config
from chunkplan.planner.catalog._data import did_you_mean, load

MAX_CONFIG_BYTES = 4 * 1024**2
"""A config.json above this size is refused unread (long rope tables stay under 100 KB)."""


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One architecture, complete enough to build the model offline from ``config``."""

    id: str
    """Catalog id; a local folder's name; ``config`` for an inline configuration."""
    hf_name: str | None
    """Name on the Hugging Face Hub; None outside the catalog."""
    architecture: str
    """Class name of the language model that transformers builds from ``config``."""
    num_parameters: int | None
    """Published count of unique parameters (tied weights once); None outside the catalog."""
    config: dict[str, Any]
    """Content of a Hugging Face config.json, for ``AutoConfig.for_model(**config)``; not to be changed."""
    licence: str | None
    source: str


def models() -> list[ModelEntry]:
    """Every catalog row, in the file's order (by family)."""
    return list(_by_id().values())


def find_model(ref: ModelRef) -> ModelEntry:
    """The architecture that ``ref`` names, checked: catalog id, Hugging Face name, local folder or inline
    config.

    Raises:
        InputError: unknown name (with near matches), unreadable folder, or a configuration that cannot be
            built.
    """
    if isinstance(ref, ModelPath):
        return _from_folder(Path(ref.path))
    if isinstance(ref, ModelConfig):
        return _entry("config", ref.config, "given in the request")
    identity = _by_name().get(ref.strip().lower())
    if identity is None:
        hint = did_you_mean(ref.strip().lower(), _by_name())
        raise InputError("model", f"no model named {ref!r} in the catalog{hint or '; `chunkplan models` lists them'}")
    return _by_id()[identity]


@cache
def _by_id() -> dict[str, ModelEntry]:
    return {
        row["id"]: ModelEntry(
            id=row["id"],
            hf_name=row["hf_name"],
            architecture=row["config"]["architectures"][0],
            num_parameters=row["num_parameters"],
            config=row["config"],
            licence=row["licence"],
            source=row["source"],
        )
        for row in load("models.json")
    }


@cache
def _by_name() -> dict[str, str]:
    """Lower-case name → id; names are ids, Hugging Face names with or without owner, and listed aliases."""
    names: dict[str, str] = {}
    for row in load("models.json"):
        for name in (row["hf_name"], *row["aliases"]):
            names[name.lower()] = row["id"]
            names.setdefault(name.lower().rpartition("/")[2], row["id"])
    return names | {row["id"]: row["id"] for row in load("models.json")}


def _from_folder(folder: Path) -> ModelEntry:
    path = folder / "config.json"
    try:
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "no such file")
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:
        raise InputError("model.path", f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > MAX_CONFIG_BYTES:
        raise InputError("model.path", f"{path} is larger than {MAX_CONFIG_BYTES} bytes: not a config.json")
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError("model.path", f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError("model.path", f"{path} holds no JSON object")
    return _entry(folder.resolve().name, config, f"config.json of {folder.resolve().name}")


def _entry(identity: str, config: dict[str, Any], source: str) -> ModelEntry:
    check_config(config)
    return ModelEntry(
        id=identity,
        hf_name=None,
        architecture=causal_lm_class(config["model_type"]),
        num_parameters=None,
        config=config,
        licence=None,
        source=source,
    )
