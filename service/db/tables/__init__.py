"""Every table. Typed columns for what is queried, JSON for specs."""

from service.db.tables.access import ApiKeyRow, IdempotencyRow
from service.db.tables.catalog import CalibrationRow, GpuRow, ModelRow
from service.db.tables.files import FileRow
from service.db.tables.jobs import AttemptRow, EventRow, JobRow
from service.db.tables.plans import PlanRow, PlanUseRow
from service.db.tables.results import ArtifactRow, CheckpointRow, MetricRow, ProfileRow, SampleRow
from service.db.tables.rollups import JobDayRow, ProfilePhaseRow

__all__ = [
    "ApiKeyRow",
    "ArtifactRow",
    "AttemptRow",
    "CalibrationRow",
    "CheckpointRow",
    "EventRow",
    "FileRow",
    "GpuRow",
    "IdempotencyRow",
    "JobDayRow",
    "JobRow",
    "MetricRow",
    "ModelRow",
    "PlanRow",
    "PlanUseRow",
    "ProfilePhaseRow",
    "ProfileRow",
    "SampleRow",
]
