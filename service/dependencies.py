"""What routes ask for, as annotated aliases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy.orm import Session

from service.files.service import FileService
from service.jobs.service import JobService
from service.plans.service import PlanService
from service.services import Services


async def _services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


ServicesDep = Annotated[Services, Depends(_services)]


def _read(services: ServicesDep) -> Iterator[Session]:
    with services.database.read() as session:
        yield session


def _write(services: ServicesDep) -> Iterator[Session]:
    with services.database.write() as session:
        yield session


async def _plans(services: ServicesDep) -> PlanService:
    return services.plans


async def _jobs(services: ServicesDep) -> JobService:
    return services.jobs


async def _files(services: ServicesDep) -> FileService:
    return services.files


# The scope "function" ends the unit of work before the response is sent: what a client is told is committed.
ReadSession = Annotated[Session, Depends(_read, scope="function")]
WriteSession = Annotated[Session, Depends(_write, scope="function")]
PlansDep = Annotated[PlanService, Depends(_plans)]
JobsDep = Annotated[JobService, Depends(_jobs)]
FilesDep = Annotated[FileService, Depends(_files)]
