"""SQL on uploaded files."""

from __future__ import annotations

from sqlalchemy import func, select

from chunkplan.service.db.repository import Repository
from chunkplan.service.db.tables import FileRow
from chunkplan.service.kit.paging import Window, newest_first


class FileRepository(Repository[FileRow]):
    """Uploaded files."""

    row, kind = FileRow, "file"

    def page(
        self, window: Window, *, purpose: str | None = None, oldest_first: bool = False
    ) -> tuple[list[FileRow], bool]:
        """Files, newest first unless told otherwise."""
        statement = select(FileRow) if purpose is None else select(FileRow).where(FileRow.purpose == purpose)
        return newest_first(self._session, statement, FileRow.created_at, FileRow.id, window, oldest_first=oldest_first)

    def stored_bytes(self) -> int:
        """How much all of them hold."""
        return int(self._session.scalar(select(func.sum(FileRow.size_bytes))) or 0)

    def delete(self, row: FileRow) -> None:
        """Removes a file's row."""
        self._session.delete(row)
