"""SQL on plans. In a project's session only those are found that the project has asked for."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session, contains_eager, joinedload

from chunkplan.service.db.tables import PlanRow, PlanUseRow
from chunkplan.service.errors import NotFound
from chunkplan.service.kit.ids import is_well_formed
from chunkplan.service.kit.paging import Window, newest_first


class PlanRepository:
    """Stored plans. They are only ever added."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find(self, plan_id: str) -> PlanRow | None:
        """A plan by its id."""
        return self._session.get(PlanRow, plan_id) if is_well_formed(plan_id) else None

    def get(self, plan_id: str) -> PlanRow:
        """A plan by its id.

        Raises:
            NotFound: there is none.
        """
        row = self.find(plan_id)
        if row is None:
            raise NotFound("plan", plan_id)
        return row

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

    def add(self, row: PlanUseRow) -> None:
        """Stores a use of a plan, and the plan with it if it is new."""
        self._session.add(row)
