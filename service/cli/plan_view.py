"""A plan as a person reads it: the verdict first, then why."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape

from chunkplan.engine.spec import ScheduleSpec, TrainingSpec
from chunkplan.planner.answers.comparison import Compared
from chunkplan.planner.spec import Alternative, ChunkPlan, Plan
from chunkplan.service.cli.output import console, count, duration, gibibytes, print_table

_BAR_WIDTH = 36
_MAX_CHUNK_ROWS = 12


def describe_schedule(schedule: ScheduleSpec) -> str:
    """``32 chunks, descending, 1 update each, states kept``."""
    if schedule.num_chunks == 1:
        return "all parameters at once"
    updates = "1 update" if schedule.switch_every == 1 else f"{schedule.switch_every} updates"
    kept = "kept" if schedule.states == "keep" else "reset"
    return f"{schedule.num_chunks} chunks, {schedule.order.value}, {updates} each, states {kept}"


def describe_method(plan: Plan) -> str:
    """What is trained, and in which order."""
    lora = plan.request.training.lora
    if lora is None:
        return describe_schedule(plan.schedule)
    return f"LoRA adapters of rank {lora.rank}: {count(plan.model.num_trainable_parameters)} parameters in fp32"


def describe_training(training: TrainingSpec) -> str:
    """The rest of what decides the memory, in one line."""
    checkpointing = training.activation_checkpointing
    recompute = checkpointing if isinstance(checkpointing, str) else f"layers {checkpointing.layers}"
    parts = [
        training.precision.value,
        training.optimizer,
        f"batch {training.micro_batch_size} × {training.seq_len} tokens",
        f"{training.gradient_accumulation_steps} micro-batches" if training.gradient_accumulation_steps > 1 else "",
        "packed" if training.packing else "",
        f"checkpointing {recompute}",
        f"{training.loss} loss",
        training.attention,
    ]
    return ", ".join(part for part in parts if part)


def print_plan(plan: Plan) -> None:
    """Verdict, peak with its breakdown, chunks, time, alternatives, warnings."""
    request, out = plan.request, console()
    device = request.gpu if isinstance(request.gpu, str) else request.gpu.name
    out.print(
        f"[bold]{escape(plan.model.name)}[/] ({count(plan.model.num_parameters)} parameters) on [bold]{device}[/]"
    )
    out.print(describe_method(plan), style="dim")
    out.print(describe_training(request.training), style="dim", soft_wrap=True)
    verdict = "[bold green]fits[/]" if plan.fits else "[bold red]does not fit[/]"
    spare = plan.capacity_bytes - plan.peak.upper_bytes
    margin = f"{gibibytes(spare)} to spare" if spare >= 0 else f"{gibibytes(-spare)} too much"
    out.print(
        f"{verdict}: up to {gibibytes(plan.peak.upper_bytes)} of {gibibytes(plan.capacity_bytes)}, {margin}\n",
        soft_wrap=True,
    )
    _print_peak(plan)
    _print_chunks(plan)
    _print_phases(plan)
    _print_time(plan)
    _print_alternatives("Alternatives", plan.alternatives)
    _print_alternatives("What auto found", plan.pareto)
    for warning in plan.warnings:
        out.print(f"[yellow]note[/]: {escape(warning)}", soft_wrap=True)


def print_comparison(entries: Sequence[Compared]) -> None:
    """A row per device and method."""
    rows = []
    for entry in entries:
        plan = entry.plan
        if plan is None:
            rows.append((entry.gpu, entry.method, "[red]refused[/]", "", "", "", "", escape(entry.refusal or "")))
            continue
        why = "" if plan.fits else refusal(plan).partition("; ")[2]
        rows.append(
            (
                entry.gpu,
                entry.method,
                "[green]fits[/]" if plan.fits else "[red]no[/]",
                gibibytes(plan.peak.upper_bytes),
                gibibytes(plan.capacity_bytes),
                duration(plan.step_seconds),
                f"{plan.tokens_per_second:,.0f}",
                escape(why),
            )
        )
    print_table("", ["device", "method", "", ">upper bound", ">of", ">step", ">tokens/s", "what would fit"], rows)


def refusal(plan: Plan) -> str:
    """One line on a plan that does not fit."""
    need, have = plan.peak.upper_bytes, plan.capacity_bytes
    problem = f"does not fit: up to {gibibytes(need)} needed, {gibibytes(have)} there"
    fitting = next((alternative for alternative in plan.alternatives if alternative.fits), None)
    if fitting is not None:
        return f"{problem}; nearest that fits: {_short(fitting)}"
    if plan.alternatives:
        return f"{problem}; {plan.alternatives[0].why}"
    return f"{problem}; no other schedule needs less: {need - have:,} bytes are missing"


def _print_peak(plan: Plan) -> None:
    peak = plan.peak
    biggest = max(plan.peak.breakdown.model_dump().values(), default=0) or 1
    rows = [
        (name.replace("_", " "), gibibytes(value), "█" * round(_BAR_WIDTH * value / biggest))
        for name, value in peak.breakdown.model_dump().items()
        if value
    ]
    rows += [
        ("[bold]allocated[/]", f"[bold]{gibibytes(peak.allocated_bytes)}[/]", "what tensors hold, at the peak"),
        ("reserved", gibibytes(peak.reserved_bytes), "what the caching allocator takes"),
        ("device", gibibytes(peak.device_bytes), "with the context and libraries, as drivers report it"),
        ("upper bound", gibibytes(peak.upper_bytes), "what admission counts with"),
        ("host", gibibytes(peak.host_bytes), "optimizer states that wait for their chunk, and the process"),
    ]
    print_table(f"Peak: chunk {peak.chunk_index}, {peak.phase}", ["", ">", ""], rows)
    console().print()


def _print_chunks(plan: Plan) -> None:
    if len(plan.chunks) == 1:
        return
    shown = _shown(plan.chunks)
    rows = [
        (
            str(chunk.index),
            gibibytes(chunk.peak_allocated_bytes),
            duration(chunk.step_seconds),
            count(chunk.num_parameters),
            _parameters(chunk),
        )
        for chunk in shown
    ]
    hidden = len(plan.chunks) - len(shown)
    title = f"Chunks ({hidden} between these not shown; --json has them)" if hidden else "Chunks"
    print_table(title, [">", ">peak", ">step", ">parameters", "from … to"], rows)
    console().print()


def _parameters(chunk: ChunkPlan) -> str:
    if chunk.first_parameter == chunk.last_parameter:
        return chunk.first_parameter
    return f"{chunk.first_parameter} … {chunk.last_parameter}"


def _shown(chunks: list[ChunkPlan]) -> list[ChunkPlan]:
    """All of a few; of many the ends, the highest and the lowest."""
    if len(chunks) <= _MAX_CHUNK_ROWS:
        return chunks
    by_peak = sorted(chunks, key=lambda chunk: chunk.peak_allocated_bytes)
    kept = {chunk.index for chunk in (*chunks[:2], *chunks[-2:], *by_peak[:1], *by_peak[-2:])}
    return [chunk for chunk in chunks if chunk.index in kept]


def _print_phases(plan: Plan) -> None:
    """Print the phases of the run, with the host's memory where it is another than the device's."""
    phases = plan.phases or []
    has_host = any(phase.host_bytes is not None for phase in phases)
    rows = [
        (
            phase.phase,
            gibibytes(phase.allocated_bytes),
            "" if phase.host_bytes is None else gibibytes(phase.host_bytes),
            "" if phase.chunk_index is None else f"chunk {phase.chunk_index}",
        )
        for phase in phases
    ]
    if rows:
        print_table("Phases of the run", ["", ">allocated", ">host" if has_host else "", "highest in"], rows)
        console().print()


def _print_time(plan: Plan) -> None:
    updates = plan.schedule.num_chunks * plan.schedule.switch_every
    cycle = f", a cycle of {updates} updates {duration(updates * plan.step_seconds)}" if updates > 1 else ""
    time = plan.time
    dense = ""
    if time is not None and time.dense_step_seconds is not None and plan.schedule.num_chunks > 1:
        dense = f"; {plan.step_seconds / time.dense_step_seconds:.2f} of a dense update"
    console().print(
        f"[bold]Time[/]: {duration(plan.step_seconds)} per update{cycle}; "
        f"{plan.tokens_per_second:,.0f} tokens/s{dense}",
        soft_wrap=True,
    )
    if time is not None and time.run_seconds is not None:
        epoch = f", {duration(time.epoch_seconds)} per epoch" if time.epoch_seconds is not None else ""
        energy = f", {time.energy_kwh:,.2f} kWh" if time.energy_kwh is not None else ""
        cost = f", ${time.cost_usd:,.2f}" if time.cost_usd is not None else ""
        console().print(
            f"[bold]Run[/]: {time.num_updates:,} updates in {duration(time.run_seconds)}{epoch}{energy}{cost}",
            soft_wrap=True,
        )
    console().print()


def _print_alternatives(title: str, alternatives: list[Alternative]) -> None:
    if not alternatives:
        return
    rows = [
        (
            "[green]fits[/]" if alternative.fits else "[red]no[/]",
            gibibytes(alternative.peak.upper_bytes),
            duration(alternative.step_seconds),
            gibibytes(alternative.peak.host_bytes),
            describe_schedule(alternative.schedule),
            escape(alternative.why),
        )
        for alternative in alternatives
    ]
    print_table(title, ["", ">upper bound", ">step", ">host", "schedule", "why"], rows)
    console().print()


def _short(alternative: Alternative) -> str:
    peak = gibibytes(alternative.peak.upper_bytes)
    return f"{describe_schedule(alternative.schedule)} (up to {peak}, {duration(alternative.step_seconds)} per update)"
