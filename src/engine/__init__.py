"""The short name of :mod:`chunkplan.engine`."""

from chunkplan.engine import Chunk, InputError, __all__, __getattr__  # noqa: F401
