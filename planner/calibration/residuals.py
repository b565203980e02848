"""How far a plan was from what was measured: per chunk and phase. Pure; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from chunkplan.planner.spec import Plan, Result

STEP = "step"
"""The chunk's highest phase."""


class MeasuredSample(Protocol):
    """What the allocator recorded in one phase of one step of one chunk."""

    @property
    def chunk_index(self) -> int:
        """The chunk that was active."""
        ...

    @property
    def phase(self) -> str:
        """The phase of the step."""
        ...

    @property
    def allocated_bytes(self) -> int:
        """The highest allocation within the phase."""
        ...


class Residual(Result):
    """Predicted against measured peak of one phase of one chunk. Bytes."""

    chunk_index: int
    phase: str
    """``forward``, ``backward``, ``optimizer``, or ``step``: the highest of them."""
    predicted_bytes: int
    measured_bytes: int
    relative_error: float
    """(predicted - measured) / measured: negative is under-prediction, the worse error."""


def residuals(plan: Plan, samples: Iterable[MeasuredSample]) -> list[Residual]:
    """Compare a plan with what a run of it measured.

    Args:
        plan: the run's plan.
        samples: in any order; a phase's measured peak is the highest of its samples. Phases that the plan
            does not predict (loading a batch) are left out.

    Returns:
        Of every chunk that was measured, its phases in the plan's order and then ``step``; by chunk.
    """
    measured: dict[tuple[int, str], int] = {}
    for sample in samples:
        key = (sample.chunk_index, sample.phase)
        measured[key] = max(measured.get(key, 0), sample.allocated_bytes)
    found: list[Residual] = []
    for chunk in plan.chunks:
        phases = [
            _residual(chunk.index, phase, predicted, measured[chunk.index, phase])
            for phase, predicted in chunk.phase_peak_bytes.items()
            if measured.get((chunk.index, phase), 0) > 0
        ]
        if phases:
            predicted = max(phase.predicted_bytes for phase in phases)
            found += [*phases, _residual(chunk.index, STEP, predicted, max(phase.measured_bytes for phase in phases))]
    return found


def _residual(index: int, phase: str, predicted_bytes: int, measured_bytes: int) -> Residual:
    return Residual(
        chunk_index=index,
        phase=phase,
        predicted_bytes=predicted_bytes,
        measured_bytes=measured_bytes,
        relative_error=(predicted_bytes - measured_bytes) / measured_bytes,
    )
