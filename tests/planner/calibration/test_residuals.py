"""Predicted against measured, per chunk and phase."""

from dataclasses import dataclass

import pytest

from chunkplan.planner.calibration.residuals import residuals
from tests.support.plans import make_plan


@dataclass(frozen=True)
class Sample:
    chunk_index: int
    phase: str
    allocated_bytes: int


@pytest.fixture
def plan():
    plan = make_plan(num_chunks=2)
    phases = {"forward": 100, "backward": 300, "optimizer": 200}
    return plan.model_copy(
        update={"chunks": [chunk.model_copy(update={"phase_peak_bytes": phases}) for chunk in plan.chunks]}
    )


def test_a_chunk_has_its_phases_and_its_highest(plan):
    samples = [Sample(0, "forward", 100), Sample(0, "backward", 400), Sample(0, "optimizer", 160)]
    rows = [
        (row.phase, row.predicted_bytes, row.measured_bytes, row.relative_error) for row in residuals(plan, samples)
    ]
    assert rows == [
        ("forward", 100, 100, 0.0),
        ("backward", 300, 400, -0.25),
        ("optimizer", 200, 160, 0.25),
        ("step", 300, 400, -0.25),
    ]


def test_the_highest_of_repeated_samples_counts(plan):
    rows = residuals(plan, [Sample(1, "forward", 80), Sample(1, "forward", 125), Sample(1, "forward", 90)])
    assert [(row.chunk_index, row.measured_bytes, row.relative_error) for row in rows] == [
        (1, 125, -0.2),
        (1, 125, -0.2),
    ]


def test_phases_that_no_plan_predicts_and_chunks_that_did_not_run_are_left_out(plan):
    assert residuals(plan, [Sample(0, "load", 50)]) == []
    assert residuals(plan, [Sample(7, "forward", 50)]) == []
    assert residuals(plan, []) == []
