"""What the planner knows by heart: devices and model architectures, as data with sources.

``gpus.json`` and ``models.json`` hold the rows; they are read when first asked for. Imports no torch.
"""

from __future__ import annotations

from chunkplan.planner.catalog._gpus import detect_gpu, detect_gpus, find_gpu, gpus
from chunkplan.planner.catalog._host import host_threads
from chunkplan.planner.catalog._models import ModelEntry, find_model, models

__all__ = ["ModelEntry", "detect_gpu", "detect_gpus", "find_gpu", "find_model", "gpus", "host_threads", "models"]
