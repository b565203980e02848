"""Every table. Typed columns for what is queried, JSON for specs."""

from chunkplan.service.db.tables.access import ApiKeyRow, IdempotencyRow
from chunkplan.service.db.tables.catalog import CalibrationRow, GpuRow, ModelRow
from chunkplan.service.db.tables.files import FileRow
from chunkplan.service.db.tables.jobs import AttemptRow, EventRow, JobRow
from chunkplan.service.db.tables.plans import PlanRow, PlanUseRow
from chunkplan.service.db.tables.results import ArtifactRow, CheckpointRow, MetricRow, ProfileRow, SampleRow
from chunkplan.service.db.tables.rollups import JobDayRow, ProfilePhaseRow

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
