"""``chunkplan models`` and ``chunkplan gpus``: what can be named, and what fits what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from chunkplan.engine.spec import TrainingSpec, parse
from chunkplan.planner.spec import GpuSpec
from chunkplan.service.cli.exits import DOES_NOT_FIT, CommandError
from chunkplan.service.cli.output import JsonOption, console, count, duration, gibibytes, print_json, print_table

if TYPE_CHECKING:
    from chunkplan.planner.answers.fits import Fit

LimitOption = Annotated[int, typer.Option("--limit", min=1, max=100, help="Stop after so many that fit.")]
SeqLenOption = Annotated[int | None, typer.Option(help="Tokens per sequence, for what fits.")]
ChunksOption = Annotated[int | None, typer.Option(help="Number of chunks, for what fits.")]


def models(
    gpu: Annotated[str | None, typer.Option(help="Which of them fit this device, the largest first.")] = None,
    seq_len: SeqLenOption = None,
    chunks: ChunksOption = None,
    limit: LimitOption = 3,
    as_json: JsonOption = False,
) -> None:
    """List the models of the catalog; any other is given by its folder. With --gpu: whether each fits."""
    from chunkplan.planner.catalog import models as known

    if gpu is not None:
        from chunkplan.planner.answers.fits import models_for
        from chunkplan.service.cli.requests import device_reference

        device = device_reference(gpu)
        _print_fits(models_for(_device(device), _training(seq_len, chunks), limit), f"on {gpu}", as_json=as_json)
        return
    entries = known()
    if as_json:
        fields = ("id", "hf_name", "architecture", "num_parameters", "licence", "source")
        print_json([{name: getattr(entry, name) for name in fields} for entry in entries])
        return
    rows = [(entry.id, count(entry.num_parameters), entry.architecture, entry.hf_name or "") for entry in entries]
    print_table("", ["id", ">parameters", "architecture", "Hugging Face name"], rows)


def gpus(
    model: Annotated[str | None, typer.Option(help="Which of them hold this model, the smallest first.")] = None,
    seq_len: SeqLenOption = None,
    chunks: ChunksOption = None,
    limit: LimitOption = 3,
    as_json: JsonOption = False,
) -> None:
    """List the devices of the catalog; any other is given as a JSON object. With --model: which of them hold
    it.
    """
    from chunkplan.planner.catalog import gpus as known

    if model is not None:
        from chunkplan.planner.answers.fits import gpus_for

        _print_fits(gpus_for(model, _training(seq_len, chunks), limit), f"of {model}", as_json=as_json)
        return
    entries = known()
    if as_json:
        print_json([entry.model_dump(mode="json") for entry in entries])
        return
    rows = [
        (
            gpu.name,
            gibibytes(gpu.memory_bytes),
            f"{gpu.memory_bandwidth / 1e9:,.0f} GB/s",
            f"{gpu.bf16_flops / 1e12:,.0f} TFLOP/s",
            "" if gpu.power_watts is None else f"{gpu.power_watts:,.0f} W",
            "" if gpu.rent_usd_per_hour is None else f"${gpu.rent_usd_per_hour:.2f}/h",
            gpu.compute_capability or "",
        )
        for gpu in entries
    ]
    print_table("", ["id", ">memory", ">bandwidth", ">bf16", ">power", ">rent", ">compute capability"], rows)


def _training(seq_len: int | None, chunks: int | None) -> TrainingSpec:
    asked = {"seq_len": seq_len, "schedule": None if chunks is None else {"num_chunks": chunks}}
    return parse(TrainingSpec, {name: value for name, value in asked.items() if value is not None})


def _device(given: str | dict[str, object]) -> GpuSpec | str:
    return parse(GpuSpec, given) if isinstance(given, dict) else given


def _print_fits(answers: Iterator[Fit], what: str, *, as_json: bool) -> None:
    """A row per answer.

    Raises:
        CommandError: nothing fits.
    """
    found = list(answers)
    if as_json:
        print_json([fit.model_dump(mode="json") for fit in found])
    else:
        rows = [
            (
                "[green]fits[/]" if fit.fits else "[red]no[/]",
                fit.model,
                fit.gpu,
                count(fit.num_parameters),
                "" if fit.upper_bytes is None else gibibytes(fit.upper_bytes),
                gibibytes(fit.capacity_bytes),
                duration(fit.step_seconds),
                "" if fit.num_chunks is None else str(fit.num_chunks),
                escape(fit.why),
            )
            for fit in found
        ]
        columns = ["", "model", "device", ">parameters", ">upper bound", ">of", ">step", ">chunks", "why not"]
        print_table(f"All parameters {what}", columns, rows)
        if any(fit.fits for fit in found):
            console().print("The rest of the catalog was not looked at.")
    if not any(fit.fits for fit in found):
        raise CommandError(f"nothing of the catalog fits: full-parameter ChunkFT {what}", DOES_NOT_FIT)
