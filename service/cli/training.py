"""``chunkplan train``: a job file on this machine, without a server."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from chunkplan.engine.errors import InputError
from chunkplan.service.cli.exits import FAILED, CommandError
from chunkplan.service.cli.output import JsonOption, console, number, print_json
from chunkplan.service.cli.planning import require_fit
from chunkplan.service.cli.progress import View, progress_view
from chunkplan.service.cli.requests import read_job_file

if TYPE_CHECKING:
    from chunkplan.service.cli.local_run import LocalRun
    from chunkplan.service.execution.executors.local import LocalExecution

_POLL_SECONDS = 0.2


class MeasuredPhase(NamedTuple):
    """What `chunkplan.planner.calibration.residuals` needs of a measured phase."""

    chunk_index: int
    phase: str
    allocated_bytes: int


@dataclass
class LocalOutcome:
    """What a run reported."""

    exit_code: int | None = None
    last_step: int = 0
    failure: dict[str, Any] | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    coverage: dict[str, Any] | None = None
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    samples: list[MeasuredPhase] = field(default_factory=list)

    def add(self, kind: str, data: dict[str, Any]) -> None:
        """Take in one event."""
        match kind:
            case "step":
                self.last_step = data["step"]
            case "eval":
                self.evaluations.append({"step": data["step"], "loss": data["loss"]})
            case "coverage":
                self.coverage = data
            case "artifact":
                self.artifacts.append(data)
            case "failed":
                self.failure = data


def train(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A job request in JSON.")],
    run_dir: Annotated[
        Path | None, typer.Option(help="Checkpoints, events and the result; by default in the data dir.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Holds models/ and runs/; by default ./var.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a job here, without a server. Ctrl-C stops at a checkpoint; the same command resumes."""
    request = read_job_file(file)
    from chunkplan.service.cli.local_run import prepare

    run = prepare(request, run_dir, data_dir)
    require_fit(run.plan)
    if not as_json:
        peak, have = run.plan.peak.upper_bytes / 2**20, run.plan.capacity_bytes / 2**20
        console().print(f"planned: up to {peak:,.0f} of {have:,.0f} MiB; run in {run.folder}", soft_wrap=True)
    run.write()
    outcome = _run(run, quiet=as_json)
    _check(outcome, run)
    # Nothing resumes from them any more; what stays is the exported model.
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    _report(outcome, run, as_json=as_json)


def _run(run: LocalRun, *, quiet: bool) -> LocalOutcome:
    """Run one attempt to its end."""
    from chunkplan.service.execution.executors.local import LocalExecution

    execution = LocalExecution(run.locks_dir)
    execution.start(run.launch)
    execution.begin(run.launch.attempt_id)
    outcome = LocalOutcome()
    with _interrupts(execution, run.launch.attempt_id), _view(quiet=quiet) as view:
        for kind, data in _events(execution, run, outcome):
            outcome.add(kind, data)
            if view is not None:
                view.show(kind, data)
    return outcome


def _events(execution: LocalExecution, run: LocalRun, outcome: LocalOutcome) -> Iterator[tuple[str, dict[str, Any]]]:
    """The attempt's events as they come, until it has ended; samples go into the outcome."""
    from chunkplan.engine.protocol import StepEvent
    from chunkplan.service.execution.records.messages import read_messages

    offset = 0
    while True:
        # Asked before reading: what an ended attempt wrote is then read to its last line.
        exit_code = execution.status(run.launch.attempt_id).exit_code
        batch = read_messages(run.events_file, offset)
        offset = batch.next_offset
        for message in batch.messages:
            if isinstance(message, StepEvent):
                outcome.samples += [
                    MeasuredPhase(message.chunk_index, sample.phase, sample.allocated_bytes)
                    for sample in message.samples
                ]
            yield message.type, message.data
        if exit_code is not None and not batch.messages:
            outcome.exit_code = exit_code
            return
        if not batch.messages:
            time.sleep(_POLL_SECONDS)


@contextmanager
def _view(*, quiet: bool) -> Iterator[View | None]:
    if quiet:
        yield None
    else:
        with progress_view() as view:
            yield view


@contextmanager
def _interrupts(execution: LocalExecution, attempt_id: str) -> Iterator[None]:
    """While the attempt runs, Ctrl-C and SIGTERM ask it to checkpoint and stop; a second one ends it."""
    num_signals = 0

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals == 1:
            execution.stop(attempt_id)
        else:
            execution.kill(attempt_id)

    before = {name: signal.signal(name, on_signal) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _check(outcome: LocalOutcome, run: LocalRun) -> None:
    """Pass a run that finished.

    Raises:
        InputError: the trainer refused its input.
        CommandError: it stopped or failed.
    """
    from chunkplan.engine.protocol import EXIT_COMPLETED, EXIT_DEVICE_BUSY, EXIT_STOPPED

    if outcome.exit_code == EXIT_COMPLETED:
        return
    if outcome.exit_code == EXIT_STOPPED:
        raise CommandError(f"stopped after update {outcome.last_step}; the same command resumes", FAILED)
    if outcome.exit_code == EXIT_DEVICE_BUSY:
        raise CommandError(f"{run.launch.device}, or this run, is in use by another trainer", FAILED)
    failure = outcome.failure or {}
    if failure.get("reason") == "input" and failure.get("field"):
        raise InputError(failure["field"], failure["detail"])
    detail = failure.get("detail") or f"the trainer ended with code {outcome.exit_code}"
    raise CommandError(f"{failure.get('reason', 'failed')}: {detail}; see {run.log_file}", FAILED)


def _report(outcome: LocalOutcome, run: LocalRun, *, as_json: bool) -> None:
    from chunkplan.planner.calibration.residuals import residuals

    compared = [item.model_dump(mode="json") for item in residuals(run.plan, outcome.samples)]
    if as_json:
        print_json(
            {
                "run_dir": str(run.folder),
                "plan_id": run.plan.id,
                "evaluations": outcome.evaluations,
                "coverage": outcome.coverage,
                "artifacts": outcome.artifacts,
                "residuals": compared,
            }
        )
        return
    from chunkplan.service.cli.residual_view import print_residuals

    print_residuals(compared, "\nPeak memory by chunk")
    if outcome.evaluations:
        first, last = outcome.evaluations[0], outcome.evaluations[-1]
        console().print(f"held-out loss {number(first['loss'])} → {number(last['loss'])}")
    if outcome.coverage is not None:
        updated, total = outcome.coverage["num_tensors_updated"], outcome.coverage["num_tensors"]
        console().print(f"tensors updated: {updated} of {total}")
    if outcome.artifacts:
        console().print(f"model in {run.folder / Path(outcome.artifacts[0]['path']).parent}", soft_wrap=True)
