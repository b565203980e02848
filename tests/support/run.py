"""A job that runs without a trainer: messages such as a trainer writes, read by the real ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chunkplan.service.execution.ledger import Handle, Ledger
from chunkplan.service.execution.records.messages import read_messages

TIME = "2026-01-01T00:00:05Z"
STARTED = {"type": "started", "time": TIME, "total_steps": 8, "resumed_step": 0}


def step(number: int, **changes: Any) -> dict[str, Any]:
    """A step's message, with one sample."""
    sample = {"phase": "forward", "allocated_bytes": 10, "reserved_bytes": 20, "host_bytes": 30, "seconds": 0.1}
    values = {"step": number, "chunk_index": 0, "loss": 2.0, "num_tokens": 64, "seconds": 0.5, "samples": [sample]}
    rest = {"type": "step", "time": TIME, "learning_rate": 1e-3, "grad_norm": 1.0, "eta_seconds": 3.0}
    return rest | values | changes


class Reports:
    """The messages of one attempt after the other."""

    def __init__(self, ledger: Ledger, folder: Path) -> None:
        self._ledger = ledger
        self._folder = folder
        self._offsets: dict[str, int] = {}

    def write(self, handle: Handle, *messages: dict[str, Any]) -> None:
        """Reports messages and has them ingested."""
        path = self._folder / f"{handle.attempt_id}.jsonl"
        with path.open("a") as file:
            file.writelines(json.dumps(message) + "\n" for message in messages)
        offset = self._offsets.get(handle.attempt_id, 0)
        batch = read_messages(path, offset)
        self._ledger.ingest(handle, batch, offset)
        self._offsets[handle.attempt_id] = batch.next_offset

    def complete(self, handle: Handle, *steps: dict[str, Any]) -> None:
        """Reports a whole run and ends it well."""
        finished = {"type": "finished", "time": TIME, "step": len(steps), "reason": "completed"}
        self.write(handle, STARTED, *steps, finished)
        self._ledger.finish(handle, 0)
