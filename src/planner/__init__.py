"""The short name of :mod:`chunkplan.planner`."""

from chunkplan.planner import *  # noqa: F403
