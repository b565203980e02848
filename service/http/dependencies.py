"""What routes ask for, as annotated aliases."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, Protocol

from fastapi import Depends, Query, Request
from sqlalchemy.orm import Session

from chunkplan.service.access.gate import CALLER, require
from chunkplan.service.access.keys import Caller, Scope
from chunkplan.service.access.limits import Turns
from chunkplan.service.db import Database
from chunkplan.service.kit.clock import Clock
from chunkplan.service.settings import Settings


class ServerParts(Protocol):
    """What any route may use of the parts in ``services.py``; the rest it asks for by :func:`part`."""

    @property
    def settings(self) -> Settings:
        """Where and how the server works."""

    @property
    def clock(self) -> Clock:
        """The server's time."""

    @property
    def database(self) -> Database:
        """All projects; ``database.of(project)`` is one."""

    @property
    def plan_turns(self) -> Turns:
        """Who may make the planner work."""

    @property
    def stream_turns(self) -> Turns:
        """Who may listen to events."""

    @property
    def is_working(self) -> bool:
        """Whether jobs are looked after, and the server is not about to stop."""


async def _server(request: Request) -> ServerParts:
    parts: ServerParts = request.app.state.services
    return parts


async def _caller(request: Request) -> Caller:
    caller = request.scope[CALLER]
    assert isinstance(caller, Caller)
    return caller


ServerDep = Annotated[ServerParts, Depends(_server)]
CallerDep = Annotated[Caller, Depends(_caller)]
"""Who asks; the gate has let them in."""


def part(name: str) -> Any:
    """Return what a route takes one of the services by: ``Annotated[JobService, part("jobs")]``."""

    async def find(server: ServerDep) -> Any:
        return getattr(server, name)

    return Depends(find)


async def _admin(caller: CallerDep) -> None:
    require(caller, Scope.ADMIN)


def _read(server: ServerDep, caller: CallerDep) -> Iterator[Session]:
    with server.database.of(caller.project).read() as session:
        yield session


def _read_widely(
    server: ServerDep,
    caller: CallerDep,
    projects: Annotated[Literal["own", "all"], Query(description="`all` needs the scope admin")] = "own",
) -> Iterator[Session]:
    if projects == "all":
        require(caller, Scope.ADMIN)
    database = server.database if projects == "all" else server.database.of(caller.project)
    with database.read() as session:
        yield session


def _write(server: ServerDep, caller: CallerDep) -> Iterator[Session]:
    with server.database.of(caller.project).write() as session:
        yield session


async def _plan_turn(server: ServerDep, caller: CallerDep) -> AsyncIterator[None]:
    async with plan_turn(server, caller):
        yield


@asynccontextmanager
async def plan_turn(server: ServerParts, caller: Caller) -> AsyncIterator[None]:
    """Requests wait for the planner here, where they hold no thread that others could use."""
    settings, turns = server.settings, server.plan_turns
    quota, seconds = settings.quota_of(caller.project), settings.plan_queue_seconds
    mine = turns.turn(f"project {caller.project}", quota.max_plans_at_once, quota.max_waiting_plans, seconds)
    async with mine, turns.turn("everybody", settings.max_plans_at_once, _UNBOUNDED, seconds):
        yield


async def _stream_turn(server: ServerDep, caller: CallerDep) -> AsyncIterator[None]:
    async with server.stream_turns.turn(caller.project, server.settings.quota_of(caller.project).max_streams):
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
