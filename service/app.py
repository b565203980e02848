"""The application: ``create_app(Settings())``. See `chunkplan.service.serve` for the server around it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import structlog
from anyio import to_thread
from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer

from chunkplan.service import errors
from chunkplan.service.access.gate import Gate
from chunkplan.service.catalog import endpoints as catalog
from chunkplan.service.dashboard import endpoints as dashboard
from chunkplan.service.db import upgrade
from chunkplan.service.errors import ProblemView
from chunkplan.service.files import endpoints as files
from chunkplan.service.fine_tuning import endpoints as fine_tuning
from chunkplan.service.http.middleware import BodyLimit, RequestContext
from chunkplan.service.http.openapi import describe
from chunkplan.service.jobs import endpoints as jobs
from chunkplan.service.jobs import stream
from chunkplan.service.kit.clock import Clock
from chunkplan.service.operation import endpoints as operation
from chunkplan.service.plans import endpoints as plans
from chunkplan.service.plans.planning_process import Planner
from chunkplan.service.profiles import endpoints as profiles
from chunkplan.service.services import Services, build_services
from chunkplan.service.settings import Settings

log = structlog.get_logger(__name__)

_MULTIPART_OVERHEAD_BYTES = 1 << 16
_DOCUMENTED_KEY = Depends(
    HTTPBearer(auto_error=False, scheme_name="API key", description="cpk_…, of `chunkplan keys create`")
)
"""Says in the documentation what the gate has done before."""


def create_app(settings: Settings, *, planner: Planner | None = None, clock: Clock | None = None) -> FastAPI:
    """The application of one server.

    Args:
        settings: where and how.
        planner: one to share between applications; by default each has a process of its own.
        clock: by default the machine's.
    """
    services = build_services(settings, planner, clock)
    app = FastAPI(
        title="chunkplan",
        version=_version(),
        summary="Which full-parameter fine-tuning run fits this model on this GPU, how fast, and with what memory.",
        lifespan=_lifespan,
        responses={"default": {"model": ProblemView}},
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.state.services = services
    app.openapi = partial(describe, app)  # type: ignore[method-assign]
    errors.install(app)
    for router in (
        catalog.router,
        plans.router,
        stream.router,
        jobs.router,
        fine_tuning.router,
        files.router,
        profiles.router,
        dashboard.router,
    ):
        app.include_router(router, dependencies=[_DOCUMENTED_KEY])
    app.include_router(operation.router)
    app.include_router(operation.scraped, dependencies=[_DOCUMENTED_KEY])
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes + _MULTIPART_OVERHEAD_BYTES,
        upload_path="/v1/files",
        max_depth=settings.max_json_depth,
    )
    app.add_middleware(Gate, access=services.access, settings=settings, clock=services.clock)
    app.add_middleware(RequestContext, answered=services.metrics.answered)
    return app


def _version() -> str:
    try:
        return version("chunkplan")
    except PackageNotFoundError:
        return "checkout"


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services = app.state.services
    assert isinstance(services, Services)
    await to_thread.run_sync(_start, services)
    try:
        yield
    finally:
        services.closing.set()
        await to_thread.run_sync(_stop, services)


def _start(services: Services) -> None:
    upgrade(services.settings.database_url)
    services.supervisor.start()
    services.housekeeper.start()
    log.info("ready", devices=[device.gpu.name for device in services.supervisor.devices])


def _stop(services: Services) -> None:
    services.housekeeper.stop()
    services.supervisor.stop()
    if services.owns_planner:
        services.planner.close()
    services.database.dispose()
