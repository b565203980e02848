"""Plans, and who asked for them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column, relationship

from chunkplan.service.db.base import Base, Identifier, Name, Owned, Reference


class PlanRow(Base):
    """A plan: immutable, named by its content, stored once whoever asks for it."""

    __tablename__ = "plans"

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


class PlanUseRow(Owned, Base):
    """A project has asked for a plan: only then is it there for the project, and since then."""

    __tablename__ = "plan_uses"
    __table_args__ = (Index(None, "project", "created_at", "plan_id"),)

    project: Mapped[Name] = mapped_column(primary_key=True)
    plan_id: Mapped[Identifier] = mapped_column(ForeignKey("plans.id"), primary_key=True, index=True)
    created_at: Mapped[datetime]

    plan: Mapped[PlanRow] = relationship(lazy="raise")
