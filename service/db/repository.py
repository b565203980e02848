"""What every repository of one kind of row does."""

from __future__ import annotations

from typing import Generic, TypeVar

from sqlalchemy.orm import Session

from chunkplan.service.errors import NotFound
from chunkplan.service.kit.ids import is_well_formed

Row = TypeVar("Row")


class Repository(Generic[Row]):
    """Rows of one kind in one unit of work. In a project's session only the project's rows are found."""

    row: type[Row]
    kind: str
    """What users call such a row."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find(self, row_id: str) -> Row | None:
        """A row by its id; None when there is none."""
        return self._session.get(self.row, row_id) if is_well_formed(row_id) else None

    def get(self, row_id: str) -> Row:
        """A row by its id.

        Raises:
            NotFound: there is none.
        """
        return self.found(self.find(row_id), row_id)

    def found(self, row: Row | None, row_id: str) -> Row:
        """The row that was looked for.

        Raises:
            NotFound: there is none.
        """
        if row is None:
            raise NotFound(self.kind, row_id)
        return row

    def add(self, row: Row) -> None:
        """Stores a new row."""
        self._session.add(row)
