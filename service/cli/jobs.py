"""``chunkplan submit`` and ``chunkplan jobs``: jobs of a running service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from chunkplan.service.cli.client import DEFAULT_URL, Client, UrlOption
from chunkplan.service.cli.exits import DOES_NOT_FIT, FAILED, CommandError
from chunkplan.service.cli.output import (
    JsonOption,
    console,
    duration,
    gibibytes,
    moment,
    number,
    print_json,
    print_table,
)
from chunkplan.service.cli.progress import progress_view
from chunkplan.service.cli.requests import read_job_file

app = typer.Typer(help="Jobs of a running service.", no_args_is_help=True)

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Its id: job_….")]
LimitOption = Annotated[int, typer.Option(min=1, help="How many, newest first.")]


def submit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A job request in JSON.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, plan and admit; store no job.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")] = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Submit a job to the service. Exit code 3 when it does not fit."""
    request = read_job_file(file)
    body = request.model_dump(mode="json", exclude_unset=True)
    with Client(url) as client:
        answer = client.post("/v1/jobs", body, **({"dry_run": "true"} if dry_run else {}))
        if as_json:
            print_json(answer)
        elif dry_run:
            need, have = gibibytes(answer["predicted_bytes"]), gibibytes(answer["available_bytes"])
            console().print(f"would be admitted: up to {need} of {have} ({answer['plan_id']})")
        else:
            console().print(f"{answer['id']} is {answer['state']} ({answer['plan_id']})")
        if not as_json and (dry_run or not watch):  # the run itself says them, too
            for warning in answer.get("warnings", []):
                console().print(f"[yellow]note[/]: {escape(warning)}", soft_wrap=True)
        if watch and not dry_run:
            follow(client, answer["id"], as_json=as_json)


@app.command("list")
def list_jobs(
    state: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs of this model.")] = None,
    limit: LimitOption = 20,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """List jobs, newest first."""
    with Client(url) as client:
        jobs = list(client.pages("/v1/jobs", limit, state=state, model=model))
    if as_json:
        print_json(jobs)
        return
    rows = [
        (
            job["id"],
            job["name"],
            job["state"],
            job["model"],
            _steps(job),
            number(job["progress"]["loss"]),
            moment(job["created_at"]),
        )
        for job in jobs
    ]
    print_table("", ["id", "name", "state", "model", ">updates", ">loss", "created"], rows)


@app.command()
def show(job: JobArgument, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """Show one job and its attempts."""
    with Client(url) as client:
        found = client.get(f"/v1/jobs/{job}")
        attempts = list(client.pages(f"/v1/jobs/{job}/attempts"))
    if as_json:
        print_json({**found, "attempts": attempts})
        return
    facts = {
        "state": f"{found['state']} ({found['reason']})",
        "detail": found["detail"],
        "model": found["model"],
        "device": found["gpu"],
        "plan": found["plan_id"],
        "profile": found["profile_id"],
        "updates": _steps(found),
        "loss": number(found["progress"]["loss"]),
        "time left": duration(found["progress"]["eta_seconds"]),
        "created": moment(found["created_at"]),
        "finished": moment(found["finished_at"]),
    }
    print_table(f"{found['name']} ({found['id']})", ["", ""], [(name, value) for name, value in facts.items() if value])
    rows = [
        (str(item["number"]), item["device"], str(item["last_step"] or "-"), str(item["reason"] or "running"))
        for item in attempts
    ]
    print_table("\nAttempts", [">number", "device", ">last update", "ended"], rows)


@app.command()
def watch(job: JobArgument, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """Follow a job to its end; exit code 1 when it does not succeed. With --json, one event per line."""
    with Client(url) as client:
        follow(client, job, as_json=as_json)


def _verb(name: str, done: str) -> None:
    @app.command(name)
    def change(job: JobArgument, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
        with Client(url) as client:
            answer = client.post(f"/v1/jobs/{job}/{name}")
        if as_json:
            print_json(answer)
        else:
            console().print(f"{answer['id']} is {answer['state']}")

    change.__doc__ = done


_verb("cancel", "Cancel a job; safe to repeat.")
_verb("pause", "Pause a job at a checkpoint; safe to repeat.")
_verb("resume", "Queue a paused job again; safe to repeat.")


def follow(client: Client, job_id: str, *, as_json: bool) -> dict[str, Any]:
    """Show a job's events until it has ended; returns the job.

    Raises:
        CommandError: it did not succeed.
    """
    client.get(f"/v1/jobs/{job_id}")
    if as_json:
        for event in client.events(job_id):
            print(json.dumps(event), flush=True)
    else:
        with progress_view() as view:
            for event in client.events(job_id):
                view.show(event["type"], event["data"])
    job: dict[str, Any] = client.get(f"/v1/jobs/{job_id}")
    if job["state"] != "succeeded":
        detail = f": {job['detail']}" if job["detail"] else ""
        code = DOES_NOT_FIT if job["state"] == "rejected" else FAILED
        raise CommandError(f"{job_id} is {job['state']} ({job['reason']}){detail}", code)
    return job


def _steps(job: dict[str, Any]) -> str:
    total = job["progress"]["total_steps"]
    return f"{job['progress']['step']}/{total}" if total else "-"
