"""Aggregates as dashboards see them: flat rows, so that a table or a chart takes them as they are."""

from __future__ import annotations

from datetime import date
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel

from chunkplan.service.jobs.schemas import JobView
from chunkplan.service.kit.paging import Listed
from chunkplan.service.profiles.schemas import ProfileView


class DeviceView(BaseModel):
    """A device of the server and what is planned on it."""

    name: str
    gpu: str
    memory_bytes: int
    """What jobs together may use of it."""
    max_jobs: int
    num_jobs: int
    """How many run there, other projects' among them."""
    planned_bytes: int
    """Upper bounds of what runs there, together."""
    measured_bytes: int | None
    """The highest allocations of the newest steps of what runs there, together."""
    job_id: str | None
    """The oldest of the next ones."""
    job_ids: list[str]
    """The project's own that run there."""


class Summary(BaseModel):
    """The state of the service at a glance."""

    object: Literal["dashboard.summary"] = "dashboard.summary"
    jobs: dict[str, int]
    """How many jobs are in each state."""
    queue_depth: int
    oldest_queued_seconds: float | None
    queue: list[JobView]
    """The jobs whose turn comes next, in that order."""
    active: list[JobView]
    recent: list[JobView]
    """The jobs that ended last, newest first."""
    devices: list[DeviceView]
    num_plans: int
    num_profiles: int
    latest_profiles: list[ProfileView]


class Dimension(StrEnum):
    """What residuals can be grouped by."""

    MODEL = "model"
    GPU = "gpu"
    PHASE = "phase"
    DAY = "day"


class AccuracyRow(Listed):
    """How far plans were from measurements, over a group of profiles; negative errors are
    under-prediction.
    """

    id: str
    """The group's values, joined by ``@``."""
    object: Literal["accuracy"] = "accuracy"
    model: str | None = None
    """As the next three: None when the rows are not grouped by it."""
    gpu: str | None = None
    phase: str | None = None
    day: date | None = None
    """On which the jobs finished (UTC)."""
    num_profiles: int
    mean_absolute_error: float
    max_absolute_error: float
    mean_error: float
    num_under: int
    """Profiles with a chunk that needed more than was predicted."""
    min_error: float
    p50: float
    """Half of the profiles were no further off than this, in their worst chunk. Within 2 % of itself, as the
    others."""
    p90: float
    p95: float
    p99: float


class UsageRow(Listed):
    """What ran on one day (UTC) in one project."""

    id: str
    object: Literal["usage"] = "usage"
    day: date
    project: str
    num_jobs: int
    """Jobs that took steps."""
    num_steps: int
    num_tokens: int
    train_seconds: float
    device_seconds: float
    """For which jobs held a device, loading and saving included; what runs counts up to now."""
    planned_bytes: int | None
    """The plans' upper bounds: the mean over the seconds in which memory was measured; None when it never
    was."""
    measured_bytes: int | None
    """The steps' highest allocations: the mean over the same seconds."""
    measured_peak_bytes: int | None
