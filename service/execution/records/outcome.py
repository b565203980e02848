"""What becomes of a job when its attempt has ended. Pure."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from chunkplan.engine.protocol import EXIT_COMPLETED, EXIT_DEVICE_BUSY, EXIT_STOPPED
from chunkplan.service.job_states import JobState, Reason

_PERMANENT = {
    "input": Reason.INPUT,
    "diverged": Reason.DIVERGED,
}
"""Failures that another attempt would only repeat."""


@dataclass(frozen=True)
class Ended:
    """How an attempt ended."""

    exit_code: int | None
    """None: its server died, and with it the knowledge."""
    finished_reason: str | None
    failed_reason: str | None
    failed_detail: str | None
    made_progress: bool
    """Whether it got past the checkpoint that it started from, and left one."""
    last_words: str | None = None
    """The last line of its log."""
    server_stopping: bool = False
    ran_out_before: bool = False
    """Whether an earlier attempt of the job ran out of memory."""


@dataclass(frozen=True)
class Outcome:
    """Where the job goes."""

    state: JobState
    reason: Reason
    detail: str | None = None
    num_failures: int = 0
    """Failed attempts in a row without progress, this one included."""
    delayed: bool = False
    """Whether the next attempt should wait a little."""
    out_of_memory: bool = False
    """Whether the attempt ran out of memory; the job, where it goes on, is planned anew."""


def decide(state: JobState, ended: Ended, num_failures: int, max_attempts: int) -> Outcome:
    """What becomes of a job in ``state`` whose attempt has ended.

    Args:
        state: of the job, before.
        ended: how the attempt ended.
        num_failures: failed attempts in a row without progress, before this one.
        max_attempts: that many of them end the job.
    """
    if state is JobState.CANCELLING:
        return Outcome(JobState.CANCELLED, Reason.USER)
    if ended.finished_reason == "completed" and ended.exit_code == EXIT_COMPLETED:
        return Outcome(JobState.SUCCEEDED, Reason.COMPLETED)
    if ended.failed_reason in _PERMANENT:
        return Outcome(JobState.FAILED, _PERMANENT[ended.failed_reason], ended.failed_detail, num_failures + 1)
    if ended.failed_reason == "out_of_memory":
        return _ran_out(state, ended, num_failures)
    if state is JobState.PAUSING:
        return Outcome(JobState.PAUSED, Reason.USER, num_failures=num_failures)
    if ended.exit_code == EXIT_DEVICE_BUSY:
        return Outcome(JobState.QUEUED, Reason.DEVICE_BUSY, num_failures=num_failures, delayed=True)
    if ended.server_stopping:
        return Outcome(JobState.QUEUED, Reason.SERVER_SHUTDOWN, num_failures=num_failures)
    failures = 1 if ended.made_progress else num_failures + 1
    reason, detail = _cause(ended)
    to = JobState.FAILED if failures >= max_attempts else JobState.QUEUED
    # A stop without progress is no reason to hurry; a lost server is: the job has waited for it already.
    return Outcome(to, reason, detail, failures, delayed=reason is not Reason.SERVER_LOST)


def _ran_out(state: JobState, ended: Ended, num_failures: int) -> Outcome:
    """Once, the job is planned anew with what was measured; what runs out again has no plan that holds."""
    if ended.ran_out_before:
        detail = f"out of memory again, after it was planned anew: {ended.failed_detail}"
        return Outcome(JobState.FAILED, Reason.OUT_OF_MEMORY, detail, num_failures + 1, out_of_memory=True)
    to = JobState.PAUSED if state is JobState.PAUSING else JobState.QUEUED
    return Outcome(to, Reason.OUT_OF_MEMORY, ended.failed_detail, num_failures, delayed=True, out_of_memory=True)


def _cause(ended: Ended) -> tuple[Reason, str]:
    if ended.failed_reason is not None:
        return Reason.ERROR, ended.failed_detail or "the trainer failed without saying why"
    if ended.exit_code is None:
        return Reason.SERVER_LOST, "the server that ran this attempt died"
    if ended.exit_code == EXIT_STOPPED:
        return Reason.INTERRUPTED, "somebody asked the trainer to stop"
    if ended.exit_code < 0:
        return Reason.PROCESS_LOST, f"the trainer was killed by {_signal_name(-ended.exit_code)}"
    return Reason.PROCESS_LOST, ended.last_words or f"the trainer exited with code {ended.exit_code} and said nothing"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
