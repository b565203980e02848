"""Routes of profiles."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from chunkplan.service.http.dependencies import ReadSession
from chunkplan.service.kit.paging import LongWindowDep, OptionalText, Page, WindowDep
from chunkplan.service.profiles.repository import ProfileRepository
from chunkplan.service.profiles.schemas import ProfileDetail, ProfileView, ResidualView, SampleView

router = APIRouter(prefix="/v1/profiles", tags=["profiles"])

OptionalIndex = Annotated[int | None, Query(ge=0, lt=2**31)]


@router.get("")
def list_profiles(
    session: ReadSession,
    window: WindowDep,
    job_id: OptionalText = None,
    model: OptionalText = None,
    gpu: OptionalText = None,
) -> Page[ProfileView]:
    """Profiles of finished jobs, newest first."""
    rows, has_more = ProfileRepository(session).page(window, job_id=job_id, model=model, gpu=gpu)
    return Page.of([ProfileView.of(row) for row in rows], has_more=has_more)


@router.get("/{profile_id}")
def show_profile(profile_id: str, session: ReadSession) -> ProfileDetail:
    """One profile."""
    profiles = ProfileRepository(session)
    row = profiles.get(profile_id)
    return ProfileDetail.with_peaks(row, *profiles.memory_peaks(row.job_id))


@router.get("/{profile_id}/samples")
def list_samples(
    profile_id: str,
    session: ReadSession,
    window: LongWindowDep,
    chunk_index: OptionalIndex = None,
    phase: OptionalText = None,
) -> Page[SampleView]:
    """What was measured, step by step and phase by phase."""
    profiles = ProfileRepository(session)
    job_id = profiles.get(profile_id).job_id
    rows, has_more = profiles.samples(job_id, window, chunk_index=chunk_index, phase=phase)
    return Page.of([SampleView.of(row) for row in rows], has_more=has_more)


@router.get("/{profile_id}/residuals")
def list_residuals(
    profile_id: str, session: ReadSession, chunk_index: OptionalIndex = None, phase: OptionalText = None
) -> Page[ResidualView]:
    """Predicted against measured peak, per chunk and phase; phase ``step`` is the chunk's highest."""
    stored = ProfileRepository(session).get(profile_id).residuals
    views = [ResidualView.of(residual) for residual in stored]
    return Page.of([view for view in views if chunk_index in (None, view.chunk_index) and phase in (None, view.phase)])
