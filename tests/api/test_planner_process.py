"""The planner's process: bounded in time, and replaced when it dies."""

import multiprocessing
import os
import signal

import psutil
import pytest

from engine.errors import InputError
from planner.spec import PlanRequest
from service.errors import Unprocessable
from service.plans.worker import PlannerProcess
from tests.support.waiting import wait_for

REQUEST = PlanRequest.model_validate({"model": "gpt2", "gpu": "rtx-4090", "training": {"seq_len": 96}})
UNKNOWN = PlanRequest(model="llama-99", gpu="rtx-4090")


@pytest.fixture
def make_planner(trace_cache):
    planners = []

    def make(timeout_seconds):
        planners.append(PlannerProcess(timeout_seconds, queue_seconds=1))
        return planners[-1]

    yield make
    for planner in planners:
        planner.close()


def child(before):
    """The process that was started since."""
    (found,) = [process for process in multiprocessing.active_children() if process.pid not in before]
    return found.pid


@pytest.fixture
def others():
    return {process.pid for process in multiprocessing.active_children()}


def test_a_plan_that_takes_too_long_is_given_up_with_its_process(make_planner, others):
    planner = make_planner(timeout_seconds=0.2)
    with pytest.raises(Unprocessable) as refusal:
        planner.plan(REQUEST)
    assert refusal.value.code == "plan_timeout"
    assert {process.pid for process in multiprocessing.active_children()} <= others


def test_a_dead_process_is_replaced(make_planner, others):
    planner = make_planner(timeout_seconds=60)
    with pytest.raises(InputError):
        planner.plan(UNKNOWN)
    first = child(others)
    os.kill(first, signal.SIGKILL)
    wait_for(
        lambda: not psutil.pid_exists(first) or psutil.Process(first).status() == psutil.STATUS_ZOMBIE, "it to die"
    )
    with pytest.raises(InputError) as error:
        planner.plan(UNKNOWN)
    assert error.value.field == "model"
    assert child(others) != first
