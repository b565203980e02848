"""Traces on disk, by content: the same architecture, spec and code are traced once. Imports torch only to trace.

The folder is ``CHUNKPLAN_CACHE_DIR``, by default ``~/.cache/chunkplan``. Every file can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkplan.engine.stream.chunks import Chunk
from chunkplan.engine.spec import Optimizer, ScheduleSpec, TrainingSpec
from chunkplan.planner.catalog.overheads import host_threads
from chunkplan.planner.trace.step_trace import StepTrace
from chunkplan.planner.trace.structure import ChunkRoles, ModelStructure

if TYPE_CHECKING:
    from chunkplan.planner.trace.recorder import Known
    from chunkplan.planner.trace.tracer import ModelTracer

_TRACED_CODE = {
    "engine": (
        "checkpointing",
        "cut",
        "expansion",
        "factored",
        "gradients",
        "lora",
        "loss",
        "models",
        "optimizer",
        "quantise",
        "rounding",
        "rules",
        "scaling",
        "states",
        "step",
        "stream",
        "tasks",
        "transfer",
    ),
    "planner": (
        "accumulation",
        "autocast",
        "kernels",
        "memory",
        "overheads",
        "segments",
        "structure",
        "trace",
        "update",
    ),
}


def cache_dir() -> Path:
    """Where traces are kept."""
    given = os.environ.get("CHUNKPLAN_CACHE_DIR")
    return Path(given) if given else Path.home() / ".cache" / "chunkplan"


@cache
def code_digest() -> str:
    """Digest of everything besides the request that decides a trace: the traced code and the libraries under it."""
    digest = hashlib.sha256(f"{version('torch')} {version('transformers')} {version('peft')}".encode())
    root = Path(__file__).parent.parent
    for package, modules in _TRACED_CODE.items():
        for module in modules:
            digest.update((root / package / f"{module}.py").read_bytes())
    return digest.hexdigest()


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
        self._steps: dict[str, StepTrace] = {}
        self._is_changed = False

    def _key(self) -> str:
        decisive = {
            "seq_len",
            "micro_batch_size",
            "packing",
            "precision",
            "autocast",
            "activation_checkpointing",
            "loss",
            "attention",
            "lora",
            "update_in_backward",
        }
        training = self._training.model_dump(mode="json", include=decisive)
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
        if key not in self._steps:
            known = self._content["steps"].get(key)
            if known is None:
                trace = self._model_tracer().trace(chunk, roles, expands=expands)
                self._content["steps"][key] = trace.to_json()
            else:
                trace = StepTrace.from_json(known)
            self._steps[key] = trace
        return self._steps[key]

    def evaluation(self) -> StepTrace:
        """A forward pass over a held-out batch, on the distinct layers."""
        key = "evaluation"
        if key not in self._steps:
            known = self._content["steps"].get(key)
            if known is None:
                trace = self._model_tracer().trace_evaluation()
                self._content["steps"][key] = trace.to_json()
            else:
                trace = StepTrace.from_json(known)
            self._steps[key] = trace
        return self._steps[key]

    def update(
        self, numel: int, num_columns: int, schedule: ScheduleSpec, *, comes: bool, leaves: bool, is_shared: bool
    ) -> StepTrace:
        """The optimizer's update of a slice of ``numel`` elements; see :func:`chunkplan.planner.trace.slice_update.trace_update`."""
        training = self._training
        kept = (schedule.states, schedule.state_dtype.value, schedule.master.value)
        shape = (numel, num_columns if training.optimizer is Optimizer.ADAFACTOR else 1)
        weights = (training.trained_precision.value, training.scales_loss)
        key = repr((shape, training.optimizer.value, weights, kept, comes, leaves, is_shared))
        if key not in self._steps:
            known = self._content["updates"].get(key)
            if known is None:
                from chunkplan.planner.trace.slice_update import trace_update

                trace = trace_update(
                    self._device_kind,
                    *shape,
                    training,
                    schedule,
                    comes=comes,
                    leaves=leaves,
                    is_shared=is_shared,
                    known=self._known,
                )
                self._content["updates"][key] = trace.to_json()
                self._is_changed = True
            else:
                trace = StepTrace.from_json(known)
            self._steps[key] = trace
        return self._steps[key]

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
