"""The state machine as data."""

import pytest

from chunkplan.service.job_states import TRANSITIONS, JobState
from chunkplan.service.jobs.service import _CANCEL, _PAUSE, _RESUME

FINAL = {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.REJECTED}


def test_every_state_has_its_transitions():
    assert set(TRANSITIONS) == set(JobState)
    assert {state for state in JobState if state.is_final} == FINAL


def test_every_state_can_be_reached_from_queued():
    reached, pending = set(), [JobState.QUEUED]
    while pending:
        state = pending.pop()
        if state not in reached:
            reached.add(state)
            pending.extend(TRANSITIONS[state])
    assert reached == set(JobState)


def test_every_state_leads_to_an_end():
    for state in JobState:
        reached, pending = set(), [state]
        while pending:
            current = pending.pop()
            if current not in reached:
                reached.add(current)
                pending.extend(TRANSITIONS[current])
        assert reached & FINAL, state


@pytest.mark.parametrize("moves", [_CANCEL, _PAUSE, _RESUME])
def test_users_can_only_do_what_the_table_allows(moves):
    for before, after in moves.items():
        assert before is after or after in TRANSITIONS[before]
        assert moves[after] is after, "a repeated request changes nothing"


def test_whatever_is_not_over_can_be_cancelled():
    assert set(_CANCEL) == set(JobState) - FINAL | {JobState.CANCELLED}
