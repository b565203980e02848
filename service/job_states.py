"""The states of a job, and every transition that is allowed, as data."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class JobState(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REJECTED = "rejected"

    @property
    def is_final(self) -> bool:
        """Whether nothing can change any more."""
        return not TRANSITIONS[self]


class Reason(StrEnum):
    """Why a job is in its state, or why an attempt ended."""

    SUBMITTED = "submitted"
    ADMITTED = "admitted"
    STARTED = "started"
    COMPLETED = "completed"
    USER = "user"
    DEVICE_BUSY = "device_busy"
    DOES_NOT_FIT = "does_not_fit"
    SERVER_SHUTDOWN = "server_shutdown"
    SERVER_LOST = "server_lost"
    PROCESS_LOST = "process_lost"
    INTERRUPTED = "interrupted"
    INPUT = "input"
    OUT_OF_MEMORY = "out_of_memory"
    DIVERGED = "diverged"
    ERROR = "error"


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.STARTING, JobState.PAUSED, JobState.CANCELLED, JobState.REJECTED}),
    JobState.STARTING: frozenset(
        {JobState.RUNNING, JobState.QUEUED, JobState.PAUSING, JobState.CANCELLING, JobState.FAILED}
    ),
    JobState.RUNNING: frozenset(
        {JobState.SUCCEEDED, JobState.FAILED, JobState.QUEUED, JobState.PAUSING, JobState.CANCELLING}
    ),
    JobState.PAUSING: frozenset({JobState.PAUSED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLING}),
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.CANCELLED}),
    JobState.CANCELLING: frozenset({JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
    JobState.REJECTED: frozenset(),
}

ACTIVE = frozenset({JobState.STARTING, JobState.RUNNING, JobState.PAUSING, JobState.CANCELLING})
"""States in which an attempt may hold a device."""
