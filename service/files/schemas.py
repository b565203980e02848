"""Files in the shape of the OpenAI API."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from chunkplan.service.db.tables import FileRow
from chunkplan.service.kit.paging import Listed


class FileView(Listed):
    """An uploaded file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    """Seconds since 1970, as the OpenAI clients read it."""
    filename: str
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["processed"] = "processed"
    sha256: str

    @classmethod
    def of(cls, row: FileRow) -> FileView:
        """The view of a stored file."""
        return cls(
            id=row.id,
            bytes=row.size_bytes,
            created_at=int(row.created_at.timestamp()),
            filename=row.filename,
            sha256=row.sha256,
        )


class FileDeleted(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True
