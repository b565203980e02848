"""A run's events as TensorBoard scalars, in RUN/tensorboard: ``tensorboard --logdir RUN`` shows them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import IO, Any

from chunkplan.engine.protocol import EvalEvent, Event, Report, StartedEvent, StepEvent, WarningEvent


class TensorBoard:
    """Passes events on to ``report``, and writes those that are numbers over updates as scalars.

    A resumed run goes on in a file of its own, which begins by taking back the steps that it does again.
    Where the folder cannot be written, the run goes on without, after one warning.

    Args:
        folder: made when the run starts.
        report: takes every event, as the trainer's own ``report`` does.
    """

    def __init__(self, folder: Path, report: Report) -> None:
        self._folder = folder
        self._report = report
        self._file: IO[bytes] | None = None
        self._records: Any = None

    def __call__(self, event: Event) -> None:
        """Pass one event on, and log what it says."""
        self._report(event)
        try:
            if isinstance(event, StartedEvent):
                self._open(event.resumed_step)
            elif self._file is not None and isinstance(event, StepEvent | EvalEvent):
                self._write(step=event.step, summary=_scalars(event))
        except OSError as error:
            self.close()
            self._report(WarningEvent(detail=f"no TensorBoard logs in {self._folder.name}/: {error.strerror}"))

    def close(self) -> None:
        """Close the file; later events are only passed on."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _open(self, resumed_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = (self._folder / f"events.out.tfevents.{time.time_ns()}").open("wb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        # Readers drop what earlier files hold of these steps. The evaluation before training is step 0.
        first_step = resumed_step + 1 if resumed_step else 0
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        assert self._file is not None
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()


def _scalars(event: StepEvent | EvalEvent) -> Any:
    """The event's numbers as a TensorBoard summary."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    if isinstance(event, EvalEvent):
        values = {"eval/loss": event.loss, "eval/perplexity": event.perplexity}
    else:
        values = {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            "train/grad_norm": event.grad_norm,
            "train/allocated_bytes": max((sample.allocated_bytes for sample in event.samples), default=None),
            "train/tokens_per_second": event.num_tokens / event.seconds,
            "train/chunk_index": event.chunk_index,
        }
    return Summary(value=[Summary.Value(tag=tag, simple_value=v) for tag, v in values.items() if v is not None])
