"""Routes of the catalogs."""

from __future__ import annotations

from fastapi import APIRouter

from chunkplan.planner.catalog import gpus, models
from chunkplan.service.catalog.schemas import GpuView, ModelView
from chunkplan.service.http.dependencies import ServerDep
from chunkplan.service.kit.paging import Page

router = APIRouter(prefix="/v1", tags=["catalogs"])


@router.get("/models")
def list_models(server: ServerDep) -> Page[ModelView]:
    """Every model that can be named; any other is given by path or by its config."""
    folder = server.settings.models_dir
    return Page.of([ModelView.of(entry, trainable=(folder / entry.id / "config.json").is_file()) for entry in models()])


@router.get("/gpus")
def list_gpus() -> Page[GpuView]:
    """Every device that can be named; any other is given inline."""
    return Page.of([GpuView.of(gpu) for gpu in gpus()])
