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

_PICTURES = (".png", ".svg", ".pdf")


def plan(
    model: Annotated[str, typer.Option(help="Catalog id, Hugging Face name, or a folder with a config.json.")],
    gpu: Annotated[
        str | None, typer.Option(help="Catalog id, 'cpu', or a JSON object; by default what this machine has.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Sequences per forward pass.")] = None,
    gradient_accumulation_steps: Annotated[int | None, typer.Option(help="Micro-batches per update.")] = None,
    packing: Annotated[
        bool, typer.Option("--packing", help="Short rows share a sequence, unseen by each other.")
    ] = False,
    method: Annotated[str | None, typer.Option(help="chunkft, full or lora.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the adapters, with method lora.")] = None,
    chunks: Annotated[int | None, typer.Option(help="Number of chunks.")] = None,
    order: Annotated[str | None, typer.Option(help="descending, ascending or random.")] = None,
    switch_every: Annotated[int | None, typer.Option(help="Updates per visit of a chunk.")] = None,
    states: Annotated[str | None, typer.Option(help="Optimizer states between visits: keep or reset.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of the weights: bf16, fp16 or fp32.")] = None,
    autocast: Annotated[str | None, typer.Option(help="Of products of fp32 weights: none, bf16 or fp16.")] = None,
    state_dtype: Annotated[str | None, typer.Option(help="How states are stored: fp32, bf16 or int8.")] = None,
    master: Annotated[str | None, typer.Option(help="Master of bf16 weights: none, residual or fp32.")] = None,
    expansion: Annotated[str | None, typer.Option(help="Of what lies above the chunk: none or factored.")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw, adamw8bit, adafactor, lion, sgd, adagrad, rmsprop.")
    ] = None,
    update_in_backward: Annotated[
        bool, typer.Option("--update-in-backward", help="Update each slice in backward; no clipping.")
    ] = False,
    checkpointing: Annotated[str | None, typer.Option(help="Activation checkpointing: full or none.")] = None,
    loss: Annotated[str | None, typer.Option(help="fused or standard.")] = None,
    attention: Annotated[str | None, typer.Option(help="sdpa or eager.")] = None,
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
) -> None:
    """Predict a run's memory and time. Exit code 3 when it does not fit."""
    schedule = {
        "num_chunks": chunks,
        "order": order,
        "switch_every": switch_every,
        "states": states,
        "state_dtype": state_dtype,
        "master": master,
        "expansion": expansion,
    }
    training = {
        "method": method,
        "lora": None if lora_rank is None else {"rank": lora_rank},
        "seq_len": seq_len,
        "micro_batch_size": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "packing": packing or None,
        "precision": precision,
        "autocast": autocast,
        "optimizer": optimizer,
        "activation_checkpointing": checkpointing,
        "loss": loss,
        "attention": attention,
        "schedule": _schedule(schedule, auto=auto),
    }
    if plot is not None and plot.suffix.lower() not in _PICTURES:
        raise InputError("plot", f"must end in {', '.join(_PICTURES)} (got {str(plot)!r})")
    request = {
        "model": model_reference(model),
        "gpu": device_reference(gpu),
        "memory_limit_bytes": None if memory_limit is None else parse_bytes("memory_limit_bytes", memory_limit),
        "run": _given({"dataset_tokens": dataset_tokens, "epochs": epochs, "max_steps": max_steps}) or None,
        "training": _given(training)
        | ({"update_in_backward": True, "max_grad_norm": None} if update_in_backward else {}),
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


def _schedule(values: dict[str, Any], *, auto: bool) -> dict[str, Any] | str | None:
    given = _given(values)
    if auto and given:
        raise InputError("training.schedule", f"--auto chooses the schedule; leave out {', '.join(given)}")
    return "auto" if auto else given or None


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
