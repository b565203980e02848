"""SQL on plans."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.tables import PlanRow
from service.errors import NotFound
from service.ids import is_well_formed
from service.paging import Window, newest_first


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

    def page(self, window: Window, *, model: str | None, gpu: str | None) -> tuple[list[PlanRow], bool]:
        """Plans, newest first."""
        statement = select(PlanRow)
        if model is not None:
            statement = statement.where(PlanRow.model == model)
        if gpu is not None:
            statement = statement.where(PlanRow.gpu == gpu)
        return newest_first(self._session, statement, PlanRow.created_at, PlanRow.id, window)

    def add(self, row: PlanRow) -> PlanRow:
        """Stores a plan."""
        self._session.add(row)
        return row
