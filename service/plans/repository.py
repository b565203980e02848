"""SQL on plans. In a project's session only those are found that the project has asked for."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import contains_eager, joinedload

from chunkplan.service.db.repository import Repository
from chunkplan.service.db.tables import PlanRow, PlanUseRow
from chunkplan.service.kit.paging import Window, newest_first


class PlanRepository(Repository[PlanRow]):
    """Stored plans. They are only ever added."""

    row, kind = PlanRow, "plan"

    def find_use(self, plan_id: str, project: str) -> PlanUseRow | None:
        """A project's use of a plan, with the plan."""
        return self._session.get(PlanUseRow, (project, plan_id), options=[joinedload(PlanUseRow.plan)])

    def page(self, window: Window, *, model: str | None, gpu: str | None) -> tuple[list[PlanUseRow], bool]:
        """Plans as a project came to know them, newest first."""
        statement = select(PlanUseRow).join(PlanUseRow.plan).options(contains_eager(PlanUseRow.plan))
        if model is not None:
            statement = statement.where(PlanRow.model == model)
        if gpu is not None:
            statement = statement.where(PlanRow.gpu == gpu)
        return newest_first(self._session, statement, PlanUseRow.created_at, PlanUseRow.plan_id, window)

    def add_use(self, row: PlanUseRow) -> None:
        """Stores a use of a plan, and the plan with it if it is new."""
        self._session.add(row)
