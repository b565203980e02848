"""The one place where a project's sessions are kept to the project: whatever they select, change or delete
through mapped classes is filtered, `Session.get` included, so that a query that does not think of projects
shows no other's rows either. What is written with plain tables or SQL text is not.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from sqlalchemy import event, select
from sqlalchemy.orm import ORMExecuteState, Session, with_loader_criteria

from chunkplan.service.db.base import OfJob, Owned
from chunkplan.service.db.tables import JobRow, PlanRow, PlanUseRow

PROJECT = "project"
"""Key under which a session's ``info`` names its project; without it the session sees everything."""

_JOBS = JobRow.__table__.alias("jobs_of_project")
_USES = PlanUseRow.__table__.alias("plans_of_project")


@event.listens_for(Session, "do_orm_execute")
def _keep_to_the_project(state: ORMExecuteState) -> None:
    project = state.session.info.get(PROJECT)
    if project is not None:
        state.statement = state.statement.options(*_criteria(project))


@lru_cache(maxsize=1024)
def _criteria(project: str) -> list[Any]:
    return [
        with_loader_criteria(Owned, lambda rows: rows.project == project, include_aliases=True),
        with_loader_criteria(
            OfJob,
            lambda rows: select(_JOBS.c.id).where(_JOBS.c.id == rows.job_id, _JOBS.c.project == project).exists(),
            include_aliases=True,
        ),
        with_loader_criteria(
            PlanRow,
            lambda rows: select(_USES.c.plan_id).where(_USES.c.plan_id == rows.id, _USES.c.project == project).exists(),
            include_aliases=True,
        ),
    ]
