"""Uploads: written beside their place, synced, renamed, then recorded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import BinaryIO

from sqlalchemy.orm import Session

from chunkplan.engine.errors import InputError
from chunkplan.engine.files import sync_path
from chunkplan.service.db import Database, take_in_turn
from chunkplan.service.db.tables import FileRow
from chunkplan.service.errors import Conflict
from chunkplan.service.files.repository import FileRepository
from chunkplan.service.kit.clock import Clock
from chunkplan.service.kit.ids import new_id
from chunkplan.service.settings import Settings

_BLOCK_BYTES = 1 << 20
_MAX_NAME_LENGTH = 200


class FileService:
    """Stores and removes uploads."""

    def __init__(
        self, database: Database, settings: Settings, clock: Clock, user_of: Callable[[Session, str], str | None]
    ) -> None:
        self._user_of = user_of
        """Finds the unfinished job that trains on a file."""
        self._database = database
        self._settings = settings
        self._folder = settings.files_dir
        self._clock = clock

    def upload(self, project: str, filename: str | None, content: BinaryIO) -> FileRow:
        """Stores an upload.

        Raises:
            InputError: it has no usable name, or is empty.
            Conflict: the project stores too much already.
        """
        now = self._clock.now()
        row = FileRow(
            id=new_id("file", now),
            project=project,
            filename=_checked_name(filename),
            purpose="fine-tune",
            created_at=now,
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        partial, final = self._folder / f".{row.id}.partial", self._folder / row.stored_name
        try:
            row.size_bytes, row.sha256 = _write(content, partial)
            with self._database.of(project).write() as session:
                self._check_quota(session, project, row.size_bytes)
                FileRepository(session).add(row)
                session.flush()
                partial.rename(final)
                sync_path(self._folder)
        except BaseException:
            partial.unlink(missing_ok=True)
            final.unlink(missing_ok=True)
            raise
        return row

    def _check_quota(self, session: Session, project: str, size_bytes: int) -> None:
        limit = self._settings.quota_of(project).max_stored_bytes
        take_in_turn(session, project)
        stored = FileRepository(session).stored_bytes()
        if stored + size_bytes > limit:
            detail = f"this project stores {stored} of {limit} bytes; {size_bytes} more are too many: delete some files"
            raise Conflict("quota_exceeded", detail)

    def delete(self, project: str, file_id: str) -> None:
        """Removes an upload.

        Raises:
            NotFound: there is no such file.
            Conflict: an unfinished job trains on it.
        """
        with self._database.of(project).write() as session:
            files = FileRepository(session)
            row = files.get(file_id)
            job_id = self._user_of(session, file_id)
            if job_id is not None:
                raise Conflict("file_in_use", f"job {job_id} trains on this file; cancel it first")
            files.delete(row)
        self.path(row).unlink(missing_ok=True)

    def path(self, row: FileRow) -> Path:
        """Where a file's content lies."""
        return self._folder / row.stored_name


def _checked_name(filename: str | None) -> str:
    name = PurePath((filename or "").replace("\\", "/")).name
    if not name or len(name) > _MAX_NAME_LENGTH or not name.isprintable():
        raise InputError(
            "file", f"should be an upload with a printable file name of at most {_MAX_NAME_LENGTH} characters"
        )
    return name


def _write(content: BinaryIO, path: Path) -> tuple[int, str]:
    """Writes and syncs; returns size and SHA-256."""
    digest, size_bytes = hashlib.sha256(), 0
    with path.open("xb") as file:
        while block := content.read(_BLOCK_BYTES):
            file.write(block)
            digest.update(block)
            size_bytes += len(block)
        file.flush()
        os.fsync(file.fileno())
    if size_bytes == 0:
        raise InputError("file", "is empty")
    return size_bytes, digest.hexdigest()
