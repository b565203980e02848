"""chunkplan's training engine: full-parameter fine-tuning, one chunk of the parameter stream at a time.

Names that need torch are imported when first used, so that servers can load the specs without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from chunkplan.engine.errors import InputError
from chunkplan.engine.stream.chunks import Chunk

if TYPE_CHECKING:
    from chunkplan.engine.gradients.activation import ActiveSlice, activate
    from chunkplan.engine.stream.parameters import ParameterStream
    from chunkplan.engine.training.chunkft import ChunkFT

__all__ = ["ActiveSlice", "Chunk", "ChunkFT", "InputError", "ParameterStream", "activate"]

_HOMES = {
    "ActiveSlice": "chunkplan.engine.gradients.activation",
    "ChunkFT": "chunkplan.engine.training.chunkft",
    "ParameterStream": "chunkplan.engine.stream.parameters",
    "activate": "chunkplan.engine.gradients.activation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
