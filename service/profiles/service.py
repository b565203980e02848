"""Making a profile out of what a finished job measured."""

from __future__ import annotations

from datetime import datetime
from statistics import fmean

from sqlalchemy.orm import Session

from chunkplan.planner.calibration.residuals import STEP, residuals
from chunkplan.planner.spec import Plan
from chunkplan.service.db.tables import JobRow, ProfilePhaseRow, ProfileRow
from chunkplan.service.kit.ids import new_id
from chunkplan.service.plans.repository import PlanRepository
from chunkplan.service.profiles.percentiles import bucket_of
from chunkplan.service.profiles.repository import ProfileRepository


def add_profile(session: Session, job: JobRow, device: str, now: datetime) -> ProfileRow:
    """Stores the profile of a job that has finished: measured peaks, and residuals against its plan."""
    profiles = ProfileRepository(session)
    plan = Plan.model_validate(PlanRepository(session).get(job.plan_id).plan)
    peaks = profiles.phase_peaks(job.id)
    compared = residuals(plan, peaks)
    errors = [residual.relative_error for residual in compared if residual.phase == STEP]
    row = ProfileRow(
        id=new_id("prof", now),
        project=job.project,
        job_id=job.id,
        plan_id=plan.id,
        model=job.model,
        gpu=job.gpu,
        device=device,
        num_samples=profiles.count_samples(job.id),
        predicted_peak_bytes=plan.peak.allocated_bytes,
        measured_peak_bytes=max((peak.allocated_bytes for peak in peaks), default=0),
        mean_absolute_error=fmean(abs(error) for error in errors) if errors else None,
        max_absolute_error=max((abs(error) for error in errors), default=None),
        mean_error=fmean(errors) if errors else None,
        min_error=min(errors, default=None),
        predicted_step_seconds=plan.step_seconds,
        measured_step_seconds=profiles.mean_step_seconds(job.id),
        residuals=[residual.model_dump() for residual in compared],
        created_at=now,
    )
    profiles.add(row)
    phases = dict.fromkeys(residual.phase for residual in compared)
    session.add_all(
        _phase(row, phase, [residual.relative_error for residual in compared if residual.phase == phase])
        for phase in phases
    )
    return row


def _phase(profile: ProfileRow, phase: str, errors: list[float]) -> ProfilePhaseRow:
    highest = max(abs(error) for error in errors)
    return ProfilePhaseRow(
        profile_id=profile.id,
        project=profile.project,
        phase=phase,
        day=profile.created_at.date(),
        model=profile.model,
        gpu=profile.gpu,
        num_chunks=len(errors),
        mean_error=fmean(errors),
        min_error=min(errors),
        mean_absolute_error=fmean(abs(error) for error in errors),
        max_absolute_error=highest,
        bucket=bucket_of(highest),
    )
