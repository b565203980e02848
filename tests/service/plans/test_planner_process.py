"""The planner's process: bounded in time, and replaced when it dies."""

import multiprocessing
import os
import signal
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import psutil
import pytest

from chunkplan.engine.errors import InputError
from chunkplan.planner.spec import PlanRequest
from chunkplan.service.errors import Unprocessable
from chunkplan.service.plans.planning_process import PlannerProcess
from tests.support.waiting import wait_for

LLAMA = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
REQUEST = PlanRequest.model_validate({"model": "gpt2", "gpu": "rtx-4090", "training": {"seq_len": 96}})
UNKNOWN = PlanRequest(model="llama-99", gpu="rtx-4090")


@pytest.fixture
def make_planner(trace_cache):
    planners = []

    def make(timeout_seconds=60, **limits):
        planners.append(PlannerProcess(timeout_seconds, queue_seconds=1, **limits))
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


def request_of(num_layers, seq_len):
    config = {**LLAMA, "num_hidden_layers": num_layers}
    training = {"seq_len": seq_len, "schedule": {"num_chunks": 1}}
    return PlanRequest.model_validate({"model": {"config": config}, "gpu": "rtx-4090", "training": training})


def test_a_plan_that_grows_past_the_memory_limit_is_given_up_with_its_process(make_planner, others):
    small = request_of(num_layers=1, seq_len=8)
    unlimited = make_planner()
    plan = unlimited.plan(small)
    enough = psutil.Process(child(others)).memory_info().data + 16 * 2**20
    unlimited.close()
    planner = make_planner(memory_bytes=enough)
    with pytest.raises(Unprocessable) as refusal:
        planner.plan(request_of(num_layers=2000, seq_len=16))
    assert refusal.value.code == "plan_memory"
    assert str(enough) in refusal.value.detail
    assert {process.pid for process in multiprocessing.active_children()} <= others
    assert planner.plan(small) == plan


def test_a_process_that_hangs_does_not_keep_others_from_planning(make_planner, others):
    planner = make_planner(num_processes=2)
    with pytest.raises(InputError):
        planner.plan(UNKNOWN)
    stopped = child(others)
    os.kill(stopped, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as callers:
        try:
            answers = [callers.submit(planner.plan, UNKNOWN) for _ in range(2)]
            done, waiting = wait(answers, return_when=FIRST_COMPLETED)
            assert (len(done), len(waiting)) == (1, 1)
        finally:
            os.kill(stopped, signal.SIGCONT)
    assert [answer.exception().field for answer in answers] == ["model", "model"]
