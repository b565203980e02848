"""``chunkplan plan``: does this run fit this device, and what will its memory do?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import parse
from chunkplan.planner.report.formats import export, format_of
from chunkplan.planner.spec import Plan, PlanRequest
from chunkplan.service.cli.exits import DOES_NOT_FIT, CommandError
from chunkplan.service.cli.output import JsonOption, console, print_json
from chunkplan.service.cli.requests import device_reference, model_reference, parse_bytes
from chunkplan.service.cli.spec_options import with_training_options
from chunkplan.service.kit.collector import collect_rarely

_PICTURES = (".png", ".svg", ".pdf")


@with_training_options
def plan(
    model: Annotated[str, typer.Option(help="Catalog id, Hugging Face name, or a folder with a config.json.")],
    gpu: Annotated[
        str | None, typer.Option(help="Catalog id, 'cpu', or a JSON object; by default what this machine has.")
    ] = None,
    memory_limit: Annotated[str | None, typer.Option(help="Use at most this much of the device: 12GiB.")] = None,
    dataset_tokens: Annotated[
        int | None, typer.Option(help="Of an epoch, padding included: for the time and cost of the whole run.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Of --dataset-tokens; by default 1.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer updates of the whole run.")] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Search for the fastest schedule that fits.")] = False,
    largest: Annotated[
        str | None, typer.Option("--max", help="Find the largest that fits: seq-len or micro-batch-size.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="Several devices and methods: 'rtx-4090,h200:chunkft,full,lora'."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the footprint: FILE.png, .svg or .pdf.")] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(help="Write the footprint: FILE.json, .perfetto.json (a trace), .pickle (for memory_viz)."),
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Of a .pickle timeline: whose step; by default the one with the peak.")
    ] = None,
    as_json: JsonOption = False,
    *,
    training: dict[str, Any],
) -> None:
    """Predict a run's memory and time. Exit code 3 when it does not fit."""
    collect_rarely()
    if auto and "schedule" in training:
        given = ", ".join(training["schedule"])
        raise InputError("training.schedule", f"--auto chooses the schedule; leave out {given}")
    if auto:
        training["schedule"] = "auto"
    if training.get("update_in_backward"):
        training.setdefault("max_grad_norm", None)
    if plot is not None and plot.suffix.lower() not in _PICTURES:
        raise InputError("plot", f"must end in {', '.join(_PICTURES)} (got {str(plot)!r})")
    request = {
        "model": model_reference(model),
        "gpu": device_reference(gpu),
        "memory_limit_bytes": None if memory_limit is None else parse_bytes("memory_limit_bytes", memory_limit),
        "run": _given({"dataset_tokens": dataset_tokens, "epochs": epochs, "max_steps": max_steps}) or None,
        "training": training,
    }
    if timeline is not None:
        format_of(timeline)
    elif chunk is not None:
        raise InputError("chunk", "says of whose step a --timeline FILE.pickle is; give that too")
    if compare is not None or largest is not None:
        if plot is not None or timeline is not None or (compare is not None and largest is not None):
            raise InputError(
                "max" if largest is not None else "compare", "goes with no --plot, --timeline or other search"
            )
        asked = parse(PlanRequest, request)
        if largest is not None:
            show_largest(asked, largest, as_json=as_json)
        else:
            show_comparison(asked, compare or "", as_json=as_json)
        return
    planned = show(parse(PlanRequest, request), as_json=as_json)
    if plot is not None:
        _draw(planned, plot, quiet=as_json)
    if timeline is not None:
        _export(planned, timeline, chunk, quiet=as_json)
    require_fit(planned)


def show(request: PlanRequest, *, as_json: bool) -> Plan:
    """Plan and print."""
    from chunkplan import planner

    planned = planner.plan(request)
    if as_json:
        print_json(planned.model_dump(mode="json"))
    else:
        from chunkplan.service.cli.plan_view import print_plan

        print_plan(planned)
    return planned


def show_largest(request: PlanRequest, name: str, *, as_json: bool) -> None:
    """Find the largest value of a field that fits, and print it with its plan.

    Raises:
        CommandError: not even the first step fits.
    """
    from chunkplan.planner.answers.largest import STEPS, largest

    field = next((known for known in STEPS if known == name.replace("-", "_")), None)
    if field is None:
        raise InputError("max", f"must be seq-len or micro-batch-size (got {name!r})")
    found = largest(request, field)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        from chunkplan.service.cli.plan_view import print_plan

        if found.value:
            print_plan(found.plan)
            console().print(f"[bold]Largest {name} that fits: {found.value}[/] (in steps of {found.step})")
        console().print(f"Not larger: {found.limit}", soft_wrap=True)
    if not found.value:
        raise CommandError(f"no {name} fits: {found.limit}", DOES_NOT_FIT)


def show_comparison(request: PlanRequest, asked: str, *, as_json: bool) -> None:
    """One model on several devices by several methods; entries that are refused say why.

    Raises:
        CommandError: none of them fits.
    """
    from chunkplan.planner.answers.comparison import compare

    devices, _, methods = asked.partition(":")
    found = compare(
        request.model,
        [name.strip() for name in devices.split(",") if name.strip()],
        [name.strip() for name in (methods or "chunkft,full").split(",") if name.strip()],
        request.training,
        request.memory_limit_bytes,
    )
    if as_json:
        print_json([entry.model_dump(mode="json") for entry in found])
    else:
        from chunkplan.service.cli.plan_view import print_comparison

        print_comparison(found)
    if not any(entry.plan is not None and entry.plan.fits for entry in found):
        raise CommandError("none of these fits", DOES_NOT_FIT)


def require_fit(planned: Plan) -> None:
    """Pass a plan that fits.

    Raises:
        CommandError: names the nearest schedule that fits, or says that none does and by how many bytes.
    """
    if planned.fits:
        return
    from chunkplan.service.cli.plan_view import refusal

    raise CommandError(refusal(planned), DOES_NOT_FIT)


def _draw(planned: Plan, path: Path, *, quiet: bool) -> None:
    from chunkplan import planner
    from chunkplan.planner.report.plot import plot_footprint

    try:
        plot_footprint(planned, planner.timeline(planned.request), path)
    except OSError as error:
        raise InputError("plot", f"cannot write {path}: {error.strerror}") from error
    if not quiet:
        console().print(f"footprint drawn in {path}", soft_wrap=True)


def _export(planned: Plan, path: Path, chunk: int | None, *, quiet: bool) -> None:
    content = export(planned, format_of(path), chunk)
    try:
        path.write_bytes(content)
    except OSError as error:
        raise InputError("timeline", f"cannot write {path}: {error.strerror}") from error
    if not quiet:
        console().print(f"timeline written to {path}", soft_wrap=True)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
