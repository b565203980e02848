"""Routes for those who operate the service."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response

from chunkplan.service.db import current_revision, head_revision
from chunkplan.service.errors import Busy
from chunkplan.service.http.dependencies import AdminOnly, ServerDep, ServerParts, part
from chunkplan.service.operation.metrics import Metrics

router = APIRouter(tags=["operation"])
"""Open to all."""
scraped = APIRouter(tags=["operation"])


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


@router.get("/healthz")
async def healthz() -> Health:
    """Whether the process answers."""
    return Health()


@router.get("/readyz")
def readyz(server: ServerDep) -> Health:
    """Whether the service can do its work: database reached and migrated, supervisor alive."""
    problem = _unready(server)
    if problem is not None:
        raise Busy("not_ready", problem, retry_after_seconds=5)
    return Health()


@scraped.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}}},
    dependencies=[AdminOnly],
)
def metrics(counters: Annotated[Metrics, part("metrics")]) -> Response:
    """Prometheus metrics, of every project together; needs the scope admin."""
    return Response(counters.render(), media_type=CONTENT_TYPE_LATEST)


def _unready(server: ServerParts) -> str | None:
    try:
        with server.database.engine.connect() as connection:
            revision = current_revision(connection)
    except SQLAlchemyError:
        return "the database cannot be reached"
    if revision != head_revision():
        return f"the database is at revision {revision}, not {head_revision()}"
    if not server.is_working:
        return "the supervisor is not running"
    return None
