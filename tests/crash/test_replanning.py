"""A job whose plan is out of date, and whose trainer runs out of memory, on a real server."""

import resource
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from sqlalchemy import insert, select, update

from chunkplan.service.db.tables import JobRow, PlanRow, PlanUseRow
from tests.support.requests import job_request
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("database_url", ["postgres"], indirect=True)]


def age_plan(services, job_id):
    """Makes a queued job's plan one that another planner has made."""
    with services.database.write() as session:
        job = session.get_one(JobRow, job_id)
        plan = dict(
            session.execute(select(*PlanRow.__table__.columns).where(PlanRow.id == job.plan_id)).mappings().one()
        )
        session.execute(insert(PlanRow), [plan | {"id": "plan_old", "planner_version": "0", "upper_bytes": 1}])
        session.add(PlanUseRow(project="default", plan_id="plan_old", created_at=job.created_at))
        session.flush()
        session.execute(update(JobRow).where(JobRow.id == job_id).values(plan_id="plan_old", upper_bytes=1))
        return plan


def starve(trainer):
    """Leaves a trainer no more memory than it has between two steps, until it ends."""
    least = None

    def ended():
        nonlocal least
        with suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
            if trainer.status() == psutil.STATUS_ZOMBIE:
                return True
            status = Path(f"/proc/{trainer.pid}/status").read_text()
            data_bytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:")) * 1024
            if least is None or data_bytes < least:
                least = data_bytes
                resource.prlimit(trainer.pid, resource.RLIMIT_DATA, (least + (1 << 20), -1))
            return False
        return True

    wait_for(ended, "the trainer to end", every=0.01)


def test_a_plan_of_another_planner_and_two_trainers_out_of_memory(client, services, start_server, dataset):
    request = job_request(dataset, max_steps=5000, seq_len=256, micro_batch_size=16, checkpoint_every=1)
    job_id = client.post("/v1/jobs", json=request).json()["id"]
    plan = age_plan(services, job_id)
    server = start_server(retry_delay_seconds=0.1)
    (event,) = server.wait_for_events(job_id, "replanned")
    assert event["data"] == {
        "reason": "planner",
        "device": "cpu",
        "from_plan_id": "plan_old",
        "from_upper_bytes": 1,
        "plan_id": plan["id"],
        "upper_bytes": plan["upper_bytes"],
        "schedule": None,
    }
    server.wait_for_events(job_id, "checkpoint", 2)
    (trainer,) = server.trainers()
    starve(trainer)
    event = server.wait_for_events(job_id, "replanned", 2)[1]["data"]
    assert (event["reason"], event["plan_id"]) == ("out_of_memory", plan["id"])
    assert event["upper_bytes"] >= event["from_upper_bytes"] >= plan["upper_bytes"]
    (first,) = server.wait_for_events(job_id, "failed")
    assert first["data"]["needed_bytes"] > 100 << 20
    started = server.wait_for_events(job_id, "started", 2)[1]["data"]
    assert started["resumed_step"] >= 2, "with the same schedule it goes on"
    (trainer,) = wait_for(server.trainers, "the second trainer")
    server.wait_for_events(job_id, "step", started["resumed_step"] + 3)
    starve(trainer)
    job = server.wait_for_state(job_id, "failed")
    assert (job["reason"], job["num_attempts"]) == ("out_of_memory", 2)
    assert "again" in job["detail"]
    assert 'chunkplan_out_of_memory_total{device="cpu"} 2.0' in server.http.get("/metrics").text
