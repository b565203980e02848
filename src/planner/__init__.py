"""The short name of :mod:`chunkplan.planner`."""

from chunkplan.planner import __all__, __getattr__  # noqa: F401
