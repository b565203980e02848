"""SQL on uploaded files."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from chunkplan.service.db.tables import FileRow
from chunkplan.service.errors import NotFound
from chunkplan.service.kit.ids import is_well_formed
from chunkplan.service.kit.paging import Window, newest_first


class FileRepository:
    """Uploaded files."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find(self, file_id: str) -> FileRow | None:
        """A file by its id."""
        return self._session.get(FileRow, file_id) if is_well_formed(file_id) else None

    def get(self, file_id: str) -> FileRow:
        """A file by its id.

        Raises:
            NotFound: there is none.
        """
        row = self.find(file_id)
        if row is None:
            raise NotFound("file", file_id)
        return row

    def page(
        self, window: Window, *, purpose: str | None = None, oldest_first: bool = False
    ) -> tuple[list[FileRow], bool]:
        """Files, newest first unless told otherwise."""
        statement = select(FileRow) if purpose is None else select(FileRow).where(FileRow.purpose == purpose)
        return newest_first(self._session, statement, FileRow.created_at, FileRow.id, window, oldest_first=oldest_first)

    def stored_bytes(self) -> int:
        """How much all of them hold."""
        return int(self._session.scalar(select(func.sum(FileRow.size_bytes))) or 0)

    def add(self, row: FileRow) -> None:
        """Stores a file's row."""
        self._session.add(row)

    def delete(self, row: FileRow) -> None:
        """Removes a file's row."""
        self._session.delete(row)
