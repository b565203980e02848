"""``chunkplan profiles``: what was measured, and how far it was from the plans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chunkplan.service.cli.client import DEFAULT_URL, Client, UrlOption
from chunkplan.service.cli.exits import FAILED, CommandError
from chunkplan.service.cli.output import (
    JsonOption,
    console,
    duration,
    gibibytes,
    moment,
    percent,
    print_json,
    print_table,
)
from chunkplan.service.cli.residual_view import print_residuals

if TYPE_CHECKING:
    from chunkplan.planner.calibration.margins import Observation

app = typer.Typer(help="What finished jobs measured, against their plans.", no_args_is_help=True)

ProfileArgument = Annotated[str, typer.Argument(metavar="PROFILE", help="Its id: prof_….")]


@app.command("list")
def list_profiles(
    model: Annotated[str | None, typer.Option(help="Only profiles of this model.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Only profiles on this device.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """List profiles, newest first."""
    with Client(url) as client:
        profiles = list(client.pages("/v1/profiles", limit, model=model, gpu=gpu))
    if as_json:
        print_json(profiles)
        return
    rows = [
        (
            item["id"],
            item["model"],
            item["gpu"],
            gibibytes(item["predicted_peak_bytes"]),
            gibibytes(item["measured_peak_bytes"]),
            percent(item["mean_error"]),
            moment(item["created_at"]),
        )
        for item in profiles
    ]
    print_table("", ["id", "model", "device", ">predicted", ">measured", ">mean error", "created"], rows)


@app.command()
def show(profile: ProfileArgument, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """Show one profile: predicted against measured, chunk by chunk."""
    with Client(url) as client:
        found = client.get(f"/v1/profiles/{profile}")
        residuals = list(client.pages(f"/v1/profiles/{profile}/residuals"))
    if as_json:
        print_json({**found, "residuals": residuals})
        return
    console().print(f"[bold]{found['model']}[/] on [bold]{found['gpu']}[/] ({found['job_id']}, {found['plan_id']})\n")
    print_residuals(residuals)
    predicted, measured = duration(found["predicted_step_seconds"]), duration(found["measured_step_seconds"])
    console().print(f"time per update: predicted {predicted}, measured {measured}")


@app.command()
def compare(
    first: ProfileArgument, second: ProfileArgument, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False
) -> None:
    """Put two profiles side by side."""
    with Client(url) as client:
        found = [client.get(f"/v1/profiles/{identity}") for identity in (first, second)]
    if as_json:
        print_json(found)
        return
    print_table("", ["", found[0]["id"], found[1]["id"]], _facts(*found))


@app.command()
def calibrate(
    output: Annotated[
        Path | None, typer.Option(help="The file to write; by default the one that plans on this machine read.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many profiles, newest first.")] = 200,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Learn bounds and times from profiles: plans made from now on use them, and name them."""
    from chunkplan.planner.calibration.margins import (
        MAX_OBSERVATIONS,
        Calibration,
        calibration_path,
        fit,
        write_calibration,
    )

    path = output or calibration_path()
    with Client(url) as client:
        learned = _observations(client, min(limit, MAX_OBSERVATIONS))
    if not learned:
        raise CommandError("no profile whose memory is still known: finish a job first", FAILED)
    kept = _known(path)
    write_calibration(Calibration(devices={**kept, **{device: runs for device, (_, runs) in learned.items()}}), path)
    margins = {device: fit(kind, runs) for device, (kind, runs) in learned.items()}
    if as_json:
        print_json({"path": str(path), "devices": {device: item.model_dump() for device, item in margins.items()}})
        return
    rows = [
        (device, str(item.num_runs), f"+{item.share:.1%}", gibibytes(item.fixed_bytes), f"{item.time_ratio:.2f}")
        for device, item in margins.items()
    ]
    print_table(f"Calibration in {path}", ["device", ">runs", ">bound", ">and", ">time ratio"], rows)


def _observations(client: Client, limit: int) -> dict[str, tuple[str, list[Observation]]]:
    """Kind and observations of every device that has profiles, oldest first."""
    from chunkplan.planner.calibration.margins import Observation, device_key
    from chunkplan.planner.catalog import find_gpu
    from chunkplan.planner.spec import Plan

    learned: dict[str, tuple[str, list[Observation]]] = {}
    for listed in reversed(list(client.pages("/v1/profiles", limit))):
        profile = client.get(f"/v1/profiles/{listed['id']}")
        plan = Plan.model_validate(client.get(f"/v1/plans/{profile['plan_id']}"))
        seen = Observation.of(
            plan,
            reserved_bytes=profile["measured_reserved_bytes"] or 0,
            process_bytes=profile["measured_process_bytes"] or 0,
            step_seconds=profile["measured_step_seconds"],
        )
        if seen is not None:
            gpu = find_gpu(plan.request.gpu)
            learned.setdefault(device_key(gpu), (gpu.kind, []))[1].append(seen)
    return learned


def _known(path: Path) -> dict[str, list[Observation]]:
    """What a file holds already: of other devices it stays."""
    from chunkplan.planner.calibration.margins import read_calibration

    return read_calibration(path).devices if path.exists() else {}


def _facts(*profiles: dict[str, Any]) -> list[list[str]]:
    lines = {
        "model": lambda item: item["model"],
        "device": lambda item: item["gpu"],
        "predicted peak": lambda item: gibibytes(item["predicted_peak_bytes"]),
        "measured peak": lambda item: gibibytes(item["measured_peak_bytes"]),
        "mean error": lambda item: percent(item["mean_error"]),
        "largest error": lambda item: percent(item["max_absolute_error"]).lstrip("+"),
        "lowest error": lambda item: percent(item["min_error"]),
        "predicted time per update": lambda item: duration(item["predicted_step_seconds"]),
        "measured time per update": lambda item: duration(item["measured_step_seconds"]),
    }
    return [[name, *(line(profile) for profile in profiles)] for name, line in lines.items()]
