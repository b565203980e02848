"""A run's events as they come: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from chunkplan.service.cli.output import console, count, duration, gibibytes, number

_LINE_SECONDS = 10.0
"""Between two plain lines about steps."""


class View(Protocol):
    """Shows events; a context manager."""

    def show(self, kind: str, data: Mapping[str, Any]) -> None:
        """Show one event."""

    def __enter__(self) -> View: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def progress_view() -> View:
    """The view that suits where the output goes."""
    return BarView() if console().is_terminal else LineView()


class LineView:
    """One line for what matters, and for a step now and then."""

    def __init__(self) -> None:
        self._next_line = 0.0

    def __enter__(self) -> LineView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, kind: str, data: Mapping[str, Any]) -> None:
        """See `View.show`."""
        if kind == "step":
            is_edge = data["step"] in (1, data["total_steps"])
            if not is_edge and time.monotonic() < self._next_line:
                return
            self._next_line = time.monotonic() + _LINE_SECONDS
        for line in describe(kind, data):
            console().print(line, markup=False, soft_wrap=True)


class BarView:
    """A bar for the steps; what else matters is printed above it."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=console(),
        )
        self._task = self._progress.add_task("waiting", total=None, status="")

    def __enter__(self) -> BarView:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, kind: str, data: Mapping[str, Any]) -> None:
        """See `View.show`."""
        if kind == "step":
            loss, left = number(data["loss"]), duration(data.get("eta_seconds"))
            status = f"loss {loss}  chunk {data['chunk_index']}  {left} left"
            self._progress.update(
                self._task, description="training", total=data["total_steps"], completed=data["step"], status=status
            )
            return
        if kind == "started":
            self._progress.update(self._task, total=data["total_steps"], completed=data["resumed_step"])
        for line in describe(kind, data):
            self._progress.print(line, markup=False, soft_wrap=True)


def describe(kind: str, data: Mapping[str, Any]) -> list[str]:
    """An event in words; nothing for those that only machines care for."""
    match kind:
        case "state":
            detail = f": {data['detail']}" if data.get("detail") else ""
            return [f"job {data['state']} ({data['reason']}){detail}"]
        case "started":
            return [_started(data)]
        case "step":
            left = duration(data.get("eta_seconds"))
            return [
                f"update {data['step']}/{data['total_steps']}  chunk {data['chunk_index']}  "
                f"loss {number(data['loss'])}  {duration(data['seconds'])}, {left} left"
            ]
        case "eval":
            return [f"held-out loss {number(data['loss'])} at update {data['step']}"]
        case "checkpoint":
            return [f"checkpoint at update {data['step']}, {gibibytes(data['size_bytes'])}"]
        case "warning":
            return [f"note: {data['detail']}"]
        case _:
            return []


def _started(data: Mapping[str, Any]) -> str:
    dataset = data["dataset"]
    rows = f"{dataset['num_train_rows']} rows to train, {dataset['num_eval_rows']} held out"
    for key, what in (("num_truncated_rows", "cut off at seq_len"), ("num_skipped_rows", "skipped")):
        if dataset[key]:
            rows += f", {dataset[key]} {what}"
    if dataset.get("num_packed_sequences"):
        rows += f"; packed into {dataset['num_packed_sequences']} sequences, {dataset['packing_density']:.1%} full"
    resumed = f", resumed after update {data['resumed_step']}" if data["resumed_step"] else ""
    over = f"over {data['num_chunks']} chunks"
    if data["num_chunks"] == 1:
        over = f"of {count(data.get('num_trainable_parameters', data.get('num_parameters')))} parameters"
    return f"started: {data['total_steps']} updates {over}, {rows}{resumed}"
