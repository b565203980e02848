"""Aggregates as dashboards see them."""

from __future__ import annotations

from datetime import date
from typing import Literal

from pydantic import BaseModel

from service.jobs.schemas import JobView
from service.paging import Listed
from service.profiles.schemas import ProfileView


class DeviceView(BaseModel):
    """A device of the server and what is planned on it."""

    name: str
    gpu: str
    memory_bytes: int
    planned_bytes: int
    job_id: str | None


class Summary(BaseModel):
    """The state of the service at a glance."""

    object: Literal["dashboard.summary"] = "dashboard.summary"
    jobs: dict[str, int]
    """How many jobs are in each state."""
    queue_depth: int
    oldest_queued_seconds: float | None
    active: list[JobView]
    devices: list[DeviceView]
    num_plans: int
    num_profiles: int
    latest_profiles: list[ProfileView]


class AccuracyRow(Listed):
    """How far plans were from measurements, over the profiles of one model on one device kind."""

    id: str
    object: Literal["accuracy"] = "accuracy"
    model: str
    gpu: str
    num_profiles: int
    mean_absolute_error: float
    max_absolute_error: float
    mean_error: float
    num_under: int
    """Profiles with a chunk that needed more than was predicted."""
    min_error: float


class UsageRow(Listed):
    """What ran on one day (UTC)."""

    id: str
    object: Literal["usage"] = "usage"
    day: date
    num_jobs: int
    num_steps: int
    num_tokens: int
    train_seconds: float
