"""What users add to the built-in catalogs, and what was learnt about devices."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy.orm import Mapped, mapped_column

from chunkplan.service.db.base import Base, Identifier, Name


class ModelRow(Base):
    """A user's model beside the built-in ones."""

    __tablename__ = "models"

    id: Mapped[Name] = mapped_column(primary_key=True)
    entry: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class GpuRow(Base):
    """A user's device beside the built-in ones."""

    __tablename__ = "gpus"

    id: Mapped[Name] = mapped_column(primary_key=True)
    entry: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class CalibrationRow(Base):
    """Constants of a device kind, fitted from stored profiles."""

    __tablename__ = "calibrations"

    id: Mapped[Identifier] = mapped_column(primary_key=True)
    gpu: Mapped[Name] = mapped_column(index=True)
    planner_version: Mapped[Name]
    num_profiles: Mapped[int]
    constants: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
