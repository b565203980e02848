"""Traces on disk, by content: the same architecture, spec and code are traced once. Imports torch only to
trace.

The folder is ``CHUNKPLAN_CACHE_DIR``, by default ``~/.cache/chunkplan``. Every file can be deleted at any
time.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkplan.engine.spec import Optimizer, ResolvedSchedule, TrainingSpec
from chunkplan.engine.stream.chunks import Chunk
from chunkplan.planner.catalog import host_threads
from chunkplan.planner.paths import cache_dir
from chunkplan.planner.trace.roles import ChunkRoles
from chunkplan.planner.trace.step_trace import StepTrace
from chunkplan.planner.trace.structure import ModelStructure
from chunkplan.planner.version import code_digest

if TYPE_CHECKING:
    from chunkplan.planner.trace.recorder import Known
    from chunkplan.planner.trace.tracer import ModelTracer

_HARMLESS = {"method", "optimizer", "schedule", "max_grad_norm", "gradient_accumulation_steps"}
"""Fields of a training spec that decide nothing about a traced step: every other one is a part of its key.

The method shows in ``lora``; optimizer and schedule are in the keys of updates; of accumulation only whether
there is any matters; clipping by norm is traced with every update.
"""
_HARMLESS_OF_SCHEDULE = {"num_chunks", "order", "switch_every", "expansion"}
"""Fields of a schedule that decide which slices there are, and when, not what happens to one."""


def deciding_an_update(schedule: ResolvedSchedule) -> str:
    """Return what of a schedule decides the update of a slice: every field but the known harmless ones."""
    return repr(schedule.model_dump(mode="json", exclude=_HARMLESS_OF_SCHEDULE))


class TraceStore:
    """All traces of one architecture under one training spec (the schedule aside) on one kind of device."""

    def __init__(self, config: dict[str, Any], training: TrainingSpec, device_kind: str) -> None:
        self._config = config
        self._training = training
        self._device_kind = device_kind
        self._tracer: ModelTracer | None = None
        self._known: Known = {}
        self._path = cache_dir() / f"{self._key()}.json"
        self._content: dict[str, Any] = self._read()
        self._traces: dict[str, StepTrace] = {}
        self._deciding: dict[ResolvedSchedule, str] = {}
        """What of a schedule decides an update, by schedule."""
        self._is_changed = False

    def _key(self) -> str:
        training = self._training.model_dump(mode="json", exclude=_HARMLESS)
        accumulates = self._training.gradient_accumulation_steps > 1
        threads = host_threads() if self._device_kind == "cpu" else 0
        asked = json.dumps(
            [self._config, training, accumulates, self._device_kind, threads, code_digest()], sort_keys=True
        )
        return hashlib.sha256(asked.encode()).hexdigest()[:32]

    def _read(self) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {"structure": None, "steps": {}, "updates": {}}
        return content

    def _model_tracer(self) -> ModelTracer:
        if self._tracer is None:
            from chunkplan.planner.trace.tracer import ModelTracer

            self._tracer = ModelTracer(self._config, self._training, self._device_kind, self._known)
        self._is_changed = True
        return self._tracer

    def structure(self) -> ModelStructure:
        """Stream and layers of the model."""
        if self._content["structure"] is None:
            self._content["structure"] = self._model_tracer().structure().to_json()
        return ModelStructure.from_json(self._content["structure"])

    def step(self, chunk: Chunk, roles: ChunkRoles, *, expands: bool) -> StepTrace:
        """Forward and backward with ``chunk`` active, on the distinct layers."""
        key = f"{'expanded ' if expands else ''}{roles.key}"
        return self._once("steps", key, lambda: self._model_tracer().trace(chunk, roles, expands=expands))

    def evaluation(self) -> StepTrace:
        """A forward pass over a held-out batch, on the distinct layers."""
        return self._once("steps", "evaluation", lambda: self._model_tracer().trace_evaluation())

    def update(
        self, numel: int, num_columns: int, schedule: ResolvedSchedule, *, comes: bool, leaves: bool, is_shared: bool
    ) -> StepTrace:
        """The optimizer's update of a slice of ``numel`` elements; see :func:`trace_update`."""
        training = self._training
        shape = (numel, num_columns if training.optimizer is Optimizer.ADAFACTOR else 1)
        weights = (training.trained_precision.value, training.scales_loss)
        if schedule not in self._deciding:
            self._deciding[schedule] = deciding_an_update(schedule)
        key = repr((shape, training.optimizer.value, weights, self._deciding[schedule], comes, leaves, is_shared))

        def trace() -> StepTrace:
            from chunkplan.planner.trace.slice_update import trace_update

            return trace_update(
                self._device_kind,
                *shape,
                training,
                schedule,
                comes=comes,
                leaves=leaves,
                is_shared=is_shared,
                known=self._known,
            )

        return self._once("updates", key, trace)

    def _once(self, table: str, key: str, trace: Callable[[], StepTrace]) -> StepTrace:
        """The trace of a key: from this process, from the file, or made now."""
        if key not in self._traces:
            known = self._content[table].get(key)
            if known is None:
                self._traces[key] = trace()
                self._content[table][key] = self._traces[key].to_json()
                self._is_changed = True
            else:
                self._traces[key] = StepTrace.from_json(known)
        return self._traces[key]

    def save(self) -> None:
        """Write what is new; a full disk or a read-only folder costs time later, never a plan now."""
        if not self._is_changed:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, suffix=".partial", delete=False) as file:
                file.write(json.dumps(self._content, separators=(",", ":")))  # in one piece: far faster than a stream
            Path(file.name).replace(self._path)
        except OSError:
            return
        self._is_changed = False
