"""chunkplan's training engine: full-parameter fine-tuning, one chunk of the parameter stream at a time.

Names that need torch are imported when first used, so that servers can load the specs without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.chunks import Chunk
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.gradients import ActiveSlice, activate
    from engine.stream import ParameterStream
    from engine.tuner import ChunkFT

__all__ = ["ActiveSlice", "Chunk", "ChunkFT", "InputError", "ParameterStream", "activate"]

_HOMES = {
    "ActiveSlice": "engine.gradients",
    "ChunkFT": "engine.tuner",
    "ParameterStream": "engine.stream",
    "activate": "engine.gradients",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
