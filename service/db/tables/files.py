"""Uploads."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import PurePath

from sqlalchemy import Index
from sqlalchemy.orm import Mapped, mapped_column

from chunkplan.service.db.base import Base, Digest, Identifier, Name, Owned


class FileRow(Owned, Base):
    """An uploaded file; its content lies in the data folder under its id."""

    __tablename__ = "files"
    __table_args__ = (Index(None, "project", "created_at", "id"),)

    id: Mapped[Identifier] = mapped_column(primary_key=True)
    filename: Mapped[Name]
    purpose: Mapped[Name]
    size_bytes: Mapped[int]
    sha256: Mapped[Digest]
    created_at: Mapped[datetime]

    @property
    def stored_name(self) -> str:
        """Name of its content in the uploads folder: the id, with the suffix (``.csv``, ``.csv.gz``) of its
        format.
        """
        suffixes = PurePath(self.filename.lower()).suffixes
        suffix = "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])
        return self.id + (suffix if re.fullmatch(r"(\.[a-z0-9]{1,10})*", suffix) else "")
