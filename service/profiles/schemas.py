"""Profiles, samples and residuals as clients see them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from chunkplan.planner.calibration.residuals import Residual
from chunkplan.service.db.tables import ProfileRow, SampleRow
from chunkplan.service.kit.paging import Listed


class ProfileView(Listed):
    """What a finished job measured against its plan. Errors are relative: (predicted - measured)
    / measured.
    """

    id: str
    object: Literal["profile"] = "profile"
    job_id: str
    plan_id: str
    model: str
    gpu: str
    device: str
    num_samples: int
    predicted_peak_bytes: int
    measured_peak_bytes: int
    mean_absolute_error: float | None
    max_absolute_error: float | None
    mean_error: float | None
    min_error: float | None
    """The worst under-prediction, when negative."""
    predicted_step_seconds: float
    measured_step_seconds: float | None
    created_at: datetime

    @classmethod
    def of(cls, row: ProfileRow) -> ProfileView:
        """The view of a stored profile."""
        return cls.from_row(row)


class ProfileDetail(ProfileView):
    """A profile with its other counters, which are known for as long as the job's samples and events are
    kept.
    """

    measured_reserved_bytes: int | None = None
    """What the caching allocator took at most; on the CPU what tensors took."""
    measured_process_bytes: int | None = None
    """The trainer's highest resident memory."""

    @classmethod
    def with_peaks(cls, row: ProfileRow, reserved_bytes: int, process_bytes: int) -> ProfileDetail:
        """The view of a stored profile; 0 bytes are unknown."""
        peaks = {"measured_reserved_bytes": reserved_bytes or None, "measured_process_bytes": process_bytes or None}
        return cls.model_validate({**ProfileView.of(row).model_dump(), **peaks})


class SampleView(Listed):
    """What the allocator recorded in one phase of one step."""

    id: str
    object: Literal["sample"] = "sample"
    attempt_id: str
    step: int
    chunk_index: int
    phase: str
    allocated_bytes: int
    reserved_bytes: int
    host_bytes: int
    seconds: float

    @classmethod
    def of(cls, row: SampleRow) -> SampleView:
        """The view of a stored sample."""
        return cls.from_row(row, id=str(row.id))


class ResidualView(Listed, Residual):
    """Predicted against measured peak of one phase of one chunk."""

    id: str
    """``<chunk>-<phase>``."""
    object: Literal["residual"] = "residual"

    @classmethod
    def of(cls, stored: dict[str, Any]) -> ResidualView:
        """The view of a stored residual."""
        return cls(id=f"{stored['chunk_index']}-{stored['phase']}", **stored)
