"""What routes ask for, as annotated aliases."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import Depends, Query, Request
from sqlalchemy.orm import Session

from chunkplan.service.access.gate import CALLER, require
from chunkplan.service.access.keys import Caller, Scope
from chunkplan.service.services import Services as Services  # routes take the type from here


async def _services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


async def _caller(request: Request) -> Caller:
    caller = request.scope[CALLER]
    assert isinstance(caller, Caller)
    return caller


ServicesDep = Annotated[Services, Depends(_services)]
CallerDep = Annotated[Caller, Depends(_caller)]
"""Who asks; the gate has let them in."""


def part(name: str) -> Any:
    """Return what a route takes one of the services by: ``Annotated[JobService, part("jobs")]``."""

    async def find(services: ServicesDep) -> Any:
        return getattr(services, name)

    return Depends(find)


async def _admin(caller: CallerDep) -> None:
    require(caller, Scope.ADMIN)


def _read(services: ServicesDep, caller: CallerDep) -> Iterator[Session]:
    with services.database.of(caller.project).read() as session:
        yield session


def _read_widely(
    services: ServicesDep,
    caller: CallerDep,
    projects: Annotated[Literal["own", "all"], Query(description="`all` needs the scope admin")] = "own",
) -> Iterator[Session]:
    if projects == "all":
        require(caller, Scope.ADMIN)
    database = services.database if projects == "all" else services.database.of(caller.project)
    with database.read() as session:
        yield session


def _write(services: ServicesDep, caller: CallerDep) -> Iterator[Session]:
    with services.database.of(caller.project).write() as session:
        yield session


async def _plan_turn(services: ServicesDep, caller: CallerDep) -> AsyncIterator[None]:
    async with plan_turn(services, caller):
        yield


@asynccontextmanager
async def plan_turn(services: Services, caller: Caller) -> AsyncIterator[None]:
    """Requests wait for the planner here, where they hold no thread that others could use."""
    settings, turns = services.settings, services.plan_turns
    quota, seconds = settings.quota_of(caller.project), settings.plan_queue_seconds
    mine = turns.turn(f"project {caller.project}", quota.max_plans_at_once, quota.max_waiting_plans, seconds)
    async with mine, turns.turn("everybody", settings.max_plans_at_once, _UNBOUNDED, seconds):
        yield


async def _stream_turn(services: ServicesDep, caller: CallerDep) -> AsyncIterator[None]:
    async with services.stream_turns.turn(caller.project, services.settings.quota_of(caller.project).max_streams):
        yield


_UNBOUNDED = 1_000_000

# The scope "function" ends the unit of work before the response is sent: what a client is told is committed.
ReadSession = Annotated[Session, Depends(_read, scope="function")]
"""Sees the caller's project, and nothing else."""
DashboardSession = Annotated[Session, Depends(_read_widely, scope="function")]
"""Sees the caller's project, or every one where an admin asks for it."""
WriteSession = Annotated[Session, Depends(_write, scope="function")]
"""Sees and changes the caller's project, and nothing else."""

AdminOnly = Depends(_admin)
PlanTurn = Depends(_plan_turn, scope="function")
"""For routes that may compute a plan."""
StreamTurn = Depends(_stream_turn, scope="request")
"""For routes that answer for as long as the client listens."""

CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
    206: {"description": "The range that was asked for"},
}
"""Responses of routes that send a file."""
