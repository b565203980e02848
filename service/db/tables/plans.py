"""Plans."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Index
from sqlalchemy.orm import Mapped, mapped_column

from service.db.base import Base, Identifier, Name, Reference


class PlanRow(Base):
    """A plan: immutable, named by its content."""

    __tablename__ = "plans"
    __table_args__ = (Index(None, "created_at", "id"),)

    id: Mapped[Identifier] = mapped_column(primary_key=True)
    planner_version: Mapped[Name]
    model: Mapped[Reference]
    gpu: Mapped[Name]
    method: Mapped[Name]
    fits: Mapped[bool]
    upper_bytes: Mapped[int]
    capacity_bytes: Mapped[int]
    step_seconds: Mapped[float]
    plan: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
