"""Who may ask, and what was already asked."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Text
from sqlalchemy.orm import Mapped, mapped_column

from chunkplan.service.db.base import Base, Digest, Identifier, Name, Owned


class ApiKeyRow(Base):
    """An API key: only its hash is stored. Rows are kept when a key is revoked."""

    __tablename__ = "api_keys"

    id: Mapped[Identifier] = mapped_column(primary_key=True)
    """The public half of the key; the key itself contains it."""
    project: Mapped[Name]
    name: Mapped[Name]
    key_sha256: Mapped[Digest] = mapped_column(unique=True)
    scopes: Mapped[list[Any]]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    """Coarse: see `chunkplan.service.access.service`."""
    revoked_at: Mapped[datetime | None]


class IdempotencyRow(Owned, Base):
    """One Idempotency-Key: in flight until ``status_code`` is set; from then on its response is replayed."""

    __tablename__ = "idempotency_keys"

    project: Mapped[Name] = mapped_column(primary_key=True)
    key: Mapped[Name] = mapped_column(primary_key=True)
    body_sha256: Mapped[Digest]
    claim: Mapped[Identifier]
    """Names the request that holds the key while it is in flight."""
    created_at: Mapped[datetime] = mapped_column(index=True)
    claim_expires_at: Mapped[datetime]
    """A request that died in flight loses its claim then."""
    status_code: Mapped[int | None]
    location: Mapped[str | None] = mapped_column(Text)
    response: Mapped[dict[str, Any] | None]
