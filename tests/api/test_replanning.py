"""Plans that are out of date, or did not hold, are made anew before a job starts; and what rises above its
bounds."""

from dataclasses import replace

import pytest
from sqlalchemy import insert, select, update

from chunkplan.service.db.tables import AttemptRow, JobRow, PlanRow, PlanUseRow
from chunkplan.service.execution.dispatch import Dispatcher
from chunkplan.service.execution.ledger import Ledger
from chunkplan.service.execution.replanning import Replanner, wanted
from chunkplan.service.job_states import JobState
from tests.support.requests import job_request
from tests.support.run import STARTED, TIME, Reports, step
from tests.support.waiting import wait_for

AUTO = {"schedule": "auto"}


@pytest.fixture
def ledger(services, settings, clock):
    return Ledger(services.database, settings, clock, services.supervisor.owner)


@pytest.fixture
def dispatch(services, ledger):
    """Dispatchers of servers with these devices."""
    replanners = []

    def dispatch(*devices):
        replanners.append(Replanner(services.plans, devices))
        return Dispatcher(ledger, replanners[-1], devices)

    yield dispatch
    for replanner in replanners:
        replanner.close()


@pytest.fixture
def device(services):
    return services.supervisor.devices[-1]


@pytest.fixture
def submit(client, dataset):
    def submit(gpu=None, **training):
        response = client.post("/v1/jobs", json=job_request(dataset, **training) | {"gpu": gpu})
        assert response.status_code == 201, response.text
        return response.json()

    return submit


@pytest.fixture
def upper_bytes(client):
    return lambda job: client.get(f"/v1/plans/{job['plan_id']}").json()["peak"]["upper_bytes"]


@pytest.fixture
def events(client):
    def events(job, kind):
        found = client.get(f"/v1/jobs/{job['id']}/events").json()["data"]
        return [event["data"] for event in found if event["type"] == kind]

    return events


def age_plan(services, job):
    """Makes a job's plan one of an older planner."""
    with services.database.write() as session:
        columns = PlanRow.__table__.columns
        plan = session.execute(select(*columns).where(columns.id == job["plan_id"])).mappings().one()
        session.execute(insert(PlanRow), [dict(plan) | {"id": "plan_old", "planner_version": "0", "upper_bytes": 1}])
        session.execute(
            insert(PlanUseRow), [{"project": "default", "plan_id": "plan_old", "created_at": plan["created_at"]}]
        )
        session.execute(update(JobRow).where(JobRow.id == job["id"]).values(plan_id="plan_old", upper_bytes=1))


def claim_in_the_end(dispatcher, device):
    """What the device is given once its plan is there."""

    def claimed():
        dispatcher.collect()
        return dispatcher.claim(device)

    return wait_for(claimed, "the new plan")


def end(client, dispatcher, device, job):
    """The job, once the dispatcher has ended it."""

    def ended():
        dispatcher.collect()
        assert dispatcher.claim(device) is None
        found = client.get(f"/v1/jobs/{job['id']}").json()
        return found if found["finished_at"] else None

    return wait_for(ended, "the job to end")


def test_a_plan_that_is_up_to_date_is_used(submit, dispatch, device, events):
    job = submit()
    assert dispatch(device).claim(device).handle.job_id == job["id"]
    assert events(job, "replanned") == []


def test_another_planner_plans_anew_and_the_device_waits_for_it(
    client, clock, services, submit, dispatch, device, upper_bytes, events
):
    job = submit()
    bound = upper_bytes(job)
    clock.advance(seconds=1)
    younger = submit(seed=1)
    age_plan(services, job)
    other = replace(device, name="cpu:1")
    dispatcher = dispatch(device, other)
    assert dispatcher.claim(device) is None, "nothing waits for the planner"
    assert dispatcher.claim(device) is None, "the device does: it is this job's turn"
    assert dispatcher.claim(other).handle.job_id == younger["id"], "other devices go on"
    claimed = claim_in_the_end(dispatcher, device)
    assert (claimed.handle.job_id, claimed.upper_bytes) == (job["id"], bound)
    (event,) = events(job, "replanned")
    assert (event["reason"], event["from_plan_id"], event["plan_id"]) == ("planner", "plan_old", job["plan_id"])
    assert (event["from_upper_bytes"], event["upper_bytes"], event["schedule"]) == (1, bound, None)


def test_another_device_plans_anew(client, submit, dispatch, device, events):
    job = submit()
    gpu = device.gpu.model_copy(update={"memory_bytes": device.gpu.memory_bytes // 2})
    smaller = replace(device, gpu=gpu)
    claimed = claim_in_the_end(dispatch(smaller), smaller)
    (event,) = events(job, "replanned")
    assert event["reason"] == "device"
    plan = client.get(f"/v1/plans/{event['plan_id']}").json()
    assert plan["capacity_bytes"] == gpu.memory_bytes
    assert claimed.handle.job_id == job["id"]


def test_a_gpu_that_the_user_gave_stays_what_is_planned_for(submit, dispatch, device, events):
    job = submit(gpu={"name": "smaller", "kind": "cpu", "memory_bytes": 4 << 30})
    assert dispatch(device).claim(device).handle.job_id == job["id"]
    assert events(job, "replanned") == []


def test_what_does_not_fit_any_more_is_rejected_with_what_is_missing(
    client, services, submit, dispatch, device, upper_bytes, events
):
    job = submit()
    age_plan(services, job)
    small = replace(device, limit_bytes=1 << 28)
    dispatcher = dispatch(small)
    ended = end(client, dispatcher, small, job)
    assert (ended["state"], ended["reason"]) == ("rejected", "does_not_fit")
    assert f"{upper_bytes(job) - (1 << 28)} more than cpu has" in ended["detail"]
    assert len(events(job, "replanned")) == 1


def test_what_fits_no_device_any_more_is_rejected_once_all_are_known(client, services, submit, dispatch, device):
    """Each of two devices is planned for; while one is not known it may be the other that holds the job."""
    job = submit()
    age_plan(services, job)
    small = [replace(device, name=f"cpu:{i}", limit_bytes=1 << 28) for i in range(2)]
    dispatcher = dispatch(*small)

    def passed_on():
        dispatcher.collect()
        assert dispatcher.claim(small[0]) is None
        return dispatcher.claim(small[1]) is None and client.get(f"/v1/jobs/{job['id']}").json()["finished_at"]

    wait_for(passed_on, "the job to end")
    assert client.get(f"/v1/jobs/{job['id']}").json()["reason"] == "does_not_fit"


def test_a_plan_that_nobody_can_read_keeps_nobody_waiting(client, clock, services, submit, dispatch, device):
    job = submit()
    clock.advance(seconds=1)
    younger = submit(seed=1)
    age_plan(services, job)
    with services.database.write() as session:
        plan = session.get_one(PlanRow, "plan_old")
        plan.plan = plan.plan | {"request": {"from": "the future"}}
    assert dispatch(device).claim(device).handle.job_id == younger["id"]
    assert client.get(f"/v1/jobs/{job['id']}").json()["state"] == "rejected"


def test_what_the_planner_refuses_now_is_rejected(client, services, submit, dispatch, device, tmp_path):
    job = submit()
    age_plan(services, job)
    with services.database.write() as session:
        plan = session.get_one(PlanRow, "plan_old")
        model = {"path": str(tmp_path / "gone")}
        plan.plan = plan.plan | {"request": plan.plan["request"] | {"model": model}}
    assert dispatch(device).claim(device) is None
    ended = client.get(f"/v1/jobs/{job['id']}").json()
    assert (ended["state"], ended["reason"], ended["field"]) == ("rejected", "input", "model.path")


def run_out(ledger, tmp_path, handle, needed_bytes):
    """An attempt that ends for want of memory."""
    failed = {
        "type": "failed",
        "time": TIME,
        "reason": "out_of_memory",
        "detail": "no more",
        "needed_bytes": needed_bytes,
    }
    Reports(ledger, tmp_path).write(handle, STARTED, step(1), failed)
    return ledger.finish(handle, 1).outcome


def test_out_of_memory_raises_the_bound_once_and_what_still_fits_is_tried_again(
    client, clock, settings, submit, dispatch, ledger, device, upper_bytes, events, tmp_path
):
    job = submit(**AUTO, seq_len=8, micro_batch_size=1)
    num_chunks = job["training"]["schedule"]["num_chunks"]
    bound = upper_bytes(job)
    limited = replace(device, limit_bytes=bound + (64 << 20))
    peak = client.get(f"/v1/plans/{job['plan_id']}").json()["peak"]
    dispatcher = dispatch(limited)
    handle = claim_in_the_end(dispatcher, limited).handle
    excess = 32 << 20
    assert run_out(ledger, tmp_path, handle, peak["device_bytes"] + excess).state == "queued"
    assert dispatcher.claim(limited) is None, "it waits a moment"
    clock.advance(seconds=settings.retry_delay_seconds)
    claimed = claim_in_the_end(dispatcher, limited)
    (event,) = events(job, "replanned")
    assert (event["reason"], event["upper_bytes"]) == ("out_of_memory", bound + excess)
    assert (claimed.upper_bytes, num_chunks) == (bound + excess, claimed.run_spec["training"]["schedule"]["num_chunks"])
    outcome = run_out(ledger, tmp_path, claimed.handle, peak["device_bytes"])
    assert (outcome.state, outcome.reason) == ("failed", "out_of_memory")
    assert "again" in outcome.detail


def test_what_exceeds_its_device_is_planned_for_the_room_that_is_left(submit, ledger, device):
    """A schedule is chosen within it; the user's own one is asked for again."""
    job = replace(ledger.planned(submit(**AUTO)["id"]), extra_bytes=1 << 20)
    small = replace(device, limit_bytes=job.upper_bytes - 1)
    asked = wanted(replace(job, has_checkpoint=True), small, [small])
    assert (asked.memory_limit_bytes, asked.training.schedule) == (small.memory_bytes - (1 << 20), "auto")
    assert wanted(job, device, [device]) == job.request, "what fits beside the raised bound stays as it is"


def test_a_chosen_schedule_is_chosen_anew_unless_there_is_a_checkpoint_of_it(
    client, services, submit, dispatch, ledger, device, events, tmp_path
):
    fresh, begun = submit(**AUTO), submit(**AUTO, seed=1)
    for job in (fresh, begun):
        with services.database.write() as session:
            row = session.get_one(JobRow, job["id"])
            schedule = row.run_spec["training"]["schedule"] | {"num_chunks": 3}
            row.run_spec = row.run_spec | {"training": row.run_spec["training"] | {"schedule": schedule}}
            row.state = JobState.PAUSED if job is fresh else JobState.QUEUED
    handle = ledger.claim(device).handle
    checkpoint = {"type": "checkpoint", "time": TIME, "step": 1, "path": "x", "size_bytes": 1, "sha256": "0" * 64}
    Reports(ledger, tmp_path).write(handle, STARTED, step(1), checkpoint)
    ledger.finish(handle, None)
    age_plan(services, begun)
    with services.database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == fresh["id"]).values(plan_id="plan_old", upper_bytes=1))
    claimed = claim_in_the_end(dispatch(device), device)
    assert claimed.run_spec["training"]["schedule"]["num_chunks"] == 3
    assert events(begun, "replanned")[0]["schedule"] is None
    ledger.finish(claimed.handle, 75, server_stopping=True)
    client.post(f"/v1/jobs/{begun['id']}/pause")
    client.post(f"/v1/jobs/{fresh['id']}/resume")
    claimed = claim_in_the_end(dispatch(device), device)
    chosen = fresh["training"]["schedule"]
    assert claimed.run_spec["training"]["schedule"] == chosen == events(fresh, "replanned")[0]["schedule"]
    assert chosen["num_chunks"] != 3


def test_a_raised_bound_that_does_not_fit_ends_the_job(
    client, clock, settings, submit, dispatch, ledger, device, upper_bytes, events, tmp_path
):
    job = submit()
    bound = upper_bytes(job)
    limited = replace(device, limit_bytes=bound + 1000)
    dispatcher = dispatch(limited)
    handle = claim_in_the_end(dispatcher, limited).handle
    run_out(ledger, tmp_path, handle, 2 * bound)
    clock.advance(seconds=settings.retry_delay_seconds)
    job = end(client, dispatcher, limited, job)
    assert (job["state"], job["reason"]) == ("rejected", "does_not_fit")
    (event,) = events(job, "replanned")
    assert event["upper_bytes"] > 2 * bound


def test_memory_above_its_bound_is_said_once_per_attempt(client, services, submit, ledger, device, events, tmp_path):
    job = submit()
    handle = ledger.claim(device).handle
    with services.database.read() as session:
        bounds = session.get_one(AttemptRow, handle.attempt_id).bounds
    peak = client.get(f"/v1/plans/{job['plan_id']}").json()["peak"]
    assert bounds["host_bytes"] == peak["upper_bytes"]
    assert bounds["allocated_bytes"] > peak["allocated_bytes"]
    sample = {"phase": "backward", "reserved_bytes": 2**50, "seconds": 0.1}
    below = sample | {name: bounds[name] for name in ("allocated_bytes", "host_bytes")}
    above = below | {"host_bytes": bounds["host_bytes"] + 7}
    reports = Reports(ledger, tmp_path)
    reports.write(handle, STARTED, step(1, samples=[below]))
    assert events(job, "drift") == []
    reports.write(handle, step(2, samples=[below, above]), step(3, samples=[above]))
    reports.write(handle, step(4, samples=[above]))
    (event,) = events(job, "drift")
    assert event == {
        "step": 2,
        "chunk_index": 0,
        "phase": "backward",
        "figure": "host_bytes",
        "measured_bytes": bounds["host_bytes"] + 7,
        "bound_bytes": bounds["host_bytes"],
        "excess_bytes": 7,
    }
    (attempt,) = client.get(f"/v1/jobs/{job['id']}/attempts").json()["data"]
    assert (attempt["drift_bytes"], attempt["upper_bytes"]) == (7, peak["upper_bytes"])
