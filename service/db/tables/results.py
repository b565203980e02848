"""What an attempt measures and makes."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from chunkplan.service.db.base import Base, BigKey, Digest, Identifier, Name, OfJob, Owned, Reference


class CheckpointRow(OfJob, Base):
    """A complete checkpoint in the run's folder."""

    __tablename__ = "checkpoints"
    __table_args__ = (Index(None, "job_id", "created_at"),)

    id: Mapped[Identifier] = mapped_column(primary_key=True)
    attempt_id: Mapped[Identifier] = mapped_column(ForeignKey("attempts.id"))
    step: Mapped[int]
    path: Mapped[Reference]
    """Relative to the run's folder."""
    size_bytes: Mapped[int]
    sha256: Mapped[Digest]
    created_at: Mapped[datetime]


class ArtifactRow(OfJob, Base):
    """A file that the job made."""

    __tablename__ = "artifacts"
    __table_args__ = (UniqueConstraint("job_id", "name"),)

    id: Mapped[Identifier] = mapped_column(primary_key=True)
    attempt_id: Mapped[Identifier] = mapped_column(ForeignKey("attempts.id"))
    name: Mapped[Reference]
    path: Mapped[Reference]
    """Relative to the run's folder."""
    size_bytes: Mapped[int]
    sha256: Mapped[Digest]
    created_at: Mapped[datetime]


class MetricRow(OfJob, Base):
    """One training step (kind ``train``) or one evaluation (``eval``)."""

    __tablename__ = "metrics"
    __table_args__ = (Index(None, "job_id", "id"),)

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    attempt_id: Mapped[Identifier] = mapped_column(ForeignKey("attempts.id"))
    kind: Mapped[Name]
    step: Mapped[int]
    superseded: Mapped[bool] = mapped_column(default=False)
    """A later attempt resumed before this step and took it again."""
    loss: Mapped[float | None]
    num_tokens: Mapped[int]
    learning_rate: Mapped[float | None]
    grad_norm: Mapped[float | None]
    chunk_index: Mapped[int | None]
    seconds: Mapped[float | None]
    allocated_bytes: Mapped[int | None]
    """The highest of the step's samples, as the next two: it stays when those are deleted."""
    reserved_bytes: Mapped[int | None]
    host_bytes: Mapped[int | None]
    created_at: Mapped[datetime]


class ProfileRow(Owned, Base):
    """What a finished job measured against its plan: kept for ever."""

    __tablename__ = "profiles"
    __table_args__ = (
        Index(None, "project", "created_at", "id"),
        Index(None, "created_at", "id"),
        Index(None, "project", "model", "gpu"),
    )

    id: Mapped[Identifier] = mapped_column(primary_key=True)
    job_id: Mapped[Identifier] = mapped_column(ForeignKey("jobs.id"), unique=True)
    plan_id: Mapped[Identifier] = mapped_column(ForeignKey("plans.id"))
    model: Mapped[Reference]
    gpu: Mapped[Name]
    device: Mapped[Name]
    num_samples: Mapped[int]
    predicted_peak_bytes: Mapped[int]
    measured_peak_bytes: Mapped[int]
    mean_absolute_error: Mapped[float | None]
    """Mean of the relative errors' magnitudes over chunks, of the chunk's peak."""
    max_absolute_error: Mapped[float | None]
    mean_error: Mapped[float | None]
    min_error: Mapped[float | None]
    """The worst under-prediction, when negative."""
    predicted_step_seconds: Mapped[float]
    measured_step_seconds: Mapped[float | None]
    residuals: Mapped[list[Any]] = mapped_column(deferred=True)
    """Wide, and not needed in lists."""
    created_at: Mapped[datetime]


class SampleRow(OfJob, Base):
    """What the allocator recorded in one phase of one step."""

    __tablename__ = "profile_samples"
    __table_args__ = (Index(None, "job_id", "id"), Index(None, "created_at"))

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    attempt_id: Mapped[Identifier] = mapped_column(ForeignKey("attempts.id"))
    step: Mapped[int]
    chunk_index: Mapped[int]
    phase: Mapped[Name]
    allocated_bytes: Mapped[int]
    reserved_bytes: Mapped[int]
    host_bytes: Mapped[int]
    seconds: Mapped[float]
    created_at: Mapped[datetime]
