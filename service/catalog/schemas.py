"""What the catalogs look like over HTTP."""

from __future__ import annotations

from typing import Any, Literal

from chunkplan.planner.catalog import ModelEntry
from chunkplan.planner.spec import GpuSpec
from chunkplan.service.kit.paging import Listed


class ModelView(Listed):
    """A model of the catalog."""

    id: str
    object: Literal["model"] = "model"
    hf_name: str | None
    architecture: str
    num_parameters: int | None
    licence: str | None
    source: str
    trainable: bool
    """Whether its weights lie in the models folder, so that a job can train it."""
    config: dict[str, Any]

    @classmethod
    def of(cls, entry: ModelEntry, *, trainable: bool) -> ModelView:
        """The view of a catalog row."""
        return cls.from_row(entry, trainable=trainable)


class GpuView(Listed, GpuSpec):
    """A device of the catalog."""

    id: str
    object: Literal["gpu"] = "gpu"

    @classmethod
    def of(cls, gpu: GpuSpec) -> GpuView:
        """The view of a catalog row."""
        return cls(id=gpu.name, **gpu.model_dump())
