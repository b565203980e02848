"""What becomes of a job when its attempt has ended."""

from dataclasses import replace

import pytest

from chunkplan.service.execution.records.outcome import Ended, decide
from chunkplan.service.job_states import TRANSITIONS, JobState, Reason


def ended(exit_code, *, finished=None, failed=None, progress=False, stopping=False):
    return Ended(exit_code, finished, failed, failed and f"{failed} it was", progress, None, stopping)


COMPLETED = ended(0, finished="completed")
RUNNING = JobState.RUNNING


@pytest.mark.parametrize(
    ("state", "how", "to", "reason"),
    [
        (RUNNING, COMPLETED, JobState.SUCCEEDED, Reason.COMPLETED),
        (RUNNING, ended(1, finished="completed"), JobState.QUEUED, Reason.PROCESS_LOST),
        (RUNNING, ended(0), JobState.QUEUED, Reason.PROCESS_LOST),
        (RUNNING, ended(None, finished="completed"), JobState.QUEUED, Reason.SERVER_LOST),
        (RUNNING, ended(-9), JobState.QUEUED, Reason.PROCESS_LOST),
        (RUNNING, ended(75, finished="stopped", stopping=True), JobState.QUEUED, Reason.SERVER_SHUTDOWN),
        (RUNNING, ended(75, finished="stopped"), JobState.QUEUED, Reason.INTERRUPTED),
        (RUNNING, ended(1, failed="error"), JobState.QUEUED, Reason.ERROR),
        (RUNNING, ended(1, failed="input"), JobState.FAILED, Reason.INPUT),
        (RUNNING, ended(1, failed="out_of_memory"), JobState.QUEUED, Reason.OUT_OF_MEMORY),
        (
            RUNNING,
            replace(ended(1, failed="out_of_memory"), ran_out_before=True),
            JobState.FAILED,
            Reason.OUT_OF_MEMORY,
        ),
        (JobState.PAUSING, ended(1, failed="out_of_memory"), JobState.PAUSED, Reason.OUT_OF_MEMORY),
        (JobState.CANCELLING, ended(1, failed="out_of_memory"), JobState.CANCELLED, Reason.USER),
        (RUNNING, ended(1, failed="diverged"), JobState.FAILED, Reason.DIVERGED),
        (JobState.STARTING, ended(76), JobState.QUEUED, Reason.DEVICE_BUSY),
        (JobState.STARTING, ended(-15, stopping=True), JobState.QUEUED, Reason.SERVER_SHUTDOWN),
        (JobState.PAUSING, ended(75, finished="stopped"), JobState.PAUSED, Reason.USER),
        (JobState.PAUSING, ended(-9), JobState.PAUSED, Reason.USER),
        (JobState.PAUSING, COMPLETED, JobState.SUCCEEDED, Reason.COMPLETED),
        (JobState.PAUSING, ended(1, failed="input"), JobState.FAILED, Reason.INPUT),
        (JobState.CANCELLING, ended(75, finished="stopped"), JobState.CANCELLED, Reason.USER),
        (JobState.CANCELLING, ended(-9), JobState.CANCELLED, Reason.USER),
        (JobState.CANCELLING, COMPLETED, JobState.CANCELLED, Reason.USER),
    ],
)
def test_every_end_leads_to_an_allowed_state(state, how, to, reason):
    outcome = decide(state, how, num_failures=0, max_attempts=3)
    assert (outcome.state, outcome.reason) == (to, reason)
    assert to in TRANSITIONS[state]


@pytest.mark.parametrize("how", [ended(1, failed="error"), ended(-9), ended(None), ended(75)])
def test_failures_without_progress_are_bounded_and_the_last_error_is_kept(how):
    second = decide(RUNNING, how, num_failures=1, max_attempts=3)
    third = decide(RUNNING, how, num_failures=2, max_attempts=3)
    assert (second.state, second.num_failures) == (JobState.QUEUED, 2)
    assert (third.state, third.num_failures) == (JobState.FAILED, 3)
    assert third.detail


def test_an_attempt_that_got_further_starts_the_count_again():
    outcome = decide(RUNNING, ended(-9, progress=True), num_failures=2, max_attempts=3)
    assert (outcome.state, outcome.num_failures) == (JobState.QUEUED, 1)


def test_a_busy_device_and_a_shutdown_are_nobodys_failure():
    for how in (ended(76), ended(75, stopping=True)):
        assert decide(JobState.STARTING, how, num_failures=2, max_attempts=3).num_failures == 2


def test_a_kill_is_named():
    assert "SIGKILL" in decide(RUNNING, ended(-9), 0, 3).detail
