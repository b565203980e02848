"""What dashboards add up instead of raw rows: written in the same unit of work as what they sum, and kept for
ever.
"""

from __future__ import annotations

from datetime import date

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from chunkplan.service.db.base import Base, Identifier, Name, Owned, Reference


class JobDayRow(Owned, Base):
    """What one job took on one day (UTC). Steps that were taken again later count: they were computed too."""

    __tablename__ = "job_days"
    __table_args__ = (Index(None, "project", "day"),)

    job_id: Mapped[Identifier] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    num_steps: Mapped[int] = mapped_column(default=0)
    num_tokens: Mapped[int] = mapped_column(default=0)
    train_seconds: Mapped[float] = mapped_column(default=0.0)
    device_seconds: Mapped[float] = mapped_column(default=0.0)
    """Seconds of its attempts that have ended, from claim to end."""
    measured_seconds: Mapped[float] = mapped_column(default=0.0)
    """The part of ``train_seconds`` whose memory was measured; what the next two are sums over."""
    planned_byte_seconds: Mapped[float] = mapped_column(default=0.0)
    """The plan's upper bound times seconds."""
    measured_byte_seconds: Mapped[float] = mapped_column(default=0.0)
    """Each step's highest allocation times its seconds."""
    measured_peak_bytes: Mapped[int] = mapped_column(default=0)


class ProfilePhaseRow(Owned, Base):
    """The residuals of one phase of one profile, over its chunks. Errors are relative, as in the profile."""

    __tablename__ = "profile_phases"
    __table_args__ = (
        # Whatever is grouped is read from this alone, and without sorting where it is grouped in this order.
        Index(
            "ix_profile_phases_groups",
            *("project", "phase", "model", "gpu", "bucket", "day"),
            *("mean_error", "min_error", "mean_absolute_error", "max_absolute_error"),
        ),
    )

    profile_id: Mapped[Identifier] = mapped_column(ForeignKey("profiles.id"), primary_key=True)
    phase: Mapped[Name] = mapped_column(primary_key=True)
    day: Mapped[date]
    model: Mapped[Reference]
    gpu: Mapped[Name]
    num_chunks: Mapped[int]
    mean_error: Mapped[float]
    min_error: Mapped[float]
    """The worst under-prediction, when negative."""
    mean_absolute_error: Mapped[float]
    max_absolute_error: Mapped[float]
    bucket: Mapped[int]
    """Bucket of ``max_absolute_error``: see `chunkplan.service.profiles.percentiles`."""
