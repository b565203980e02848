"""The picture of a footprint."""

import subprocess
import sys

import pytest

from chunkplan.engine.spec import ResolvedSchedule
from chunkplan.planner.report.plot import plot_footprint
from chunkplan.planner.spec import Alternative, Breakdown, Timeline, TimelinePoint
from tests.support.plans import GIB, make_plan


def make_timeline(capacity_bytes, num_chunks=4):
    points, seconds = [], 0.0
    for chunk in reversed(range(num_chunks)):
        for phase, num_layers in (("forward", 8), ("backward", 8), ("optimizer", 1)):
            for layer in range(num_layers):
                held = GIB // 20 * (layer if phase == "forward" else num_layers - layer)
                breakdown = Breakdown(
                    weights=15 * GIB,
                    gradients=GIB // 2 if phase != "forward" else 0,
                    optimizer_states=GIB,
                    activations=held,
                    loss=GIB // 8 if phase == "backward" and layer == 0 else 0,
                    workspace=GIB // 32,
                    other=0,
                )
                points.append(
                    TimelinePoint(
                        chunk_index=chunk,
                        phase=phase,
                        segment=f"layer {layer}",
                        seconds=seconds,
                        allocated_bytes=breakdown.total_bytes,
                        breakdown=breakdown,
                    )
                )
                seconds += 0.05
    return Timeline(plan_id="plan_x", capacity_bytes=capacity_bytes, points=points)


@pytest.mark.parametrize("capacity_bytes", [16 * GIB, 24 * GIB, 80 * GIB])
@pytest.mark.parametrize("num_chunks", [1, 40])
def test_a_picture_is_written(tmp_path, capacity_bytes, num_chunks):
    path = tmp_path / "footprint.png"
    plan = make_plan(capacity_bytes=capacity_bytes, num_chunks=num_chunks)
    plot_footprint(plan, make_timeline(capacity_bytes, num_chunks), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000


def test_the_words_in_the_picture(tmp_path):
    path = tmp_path / "footprint.svg"
    code = "import sys; import chunkplan.planner.report.plot; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
    plot_footprint(make_plan(capacity_bytes=24 * GIB), make_timeline(24 * GIB), path)
    svg = path.read_text()
    for words in ("llama-3-8b on rtx-4090: fits", "capacity 24.00 GiB", "optimizer states", "chunk 3, "):
        assert f"<!-- {words}" in svg or words in svg


def test_the_front_is_drawn_when_there_is_one(tmp_path):
    path = tmp_path / "front.svg"
    plan = make_plan(capacity_bytes=24 * GIB)
    shared = {"training": plan.request.training, "peak": plan.peak, "fits": True, "why": "why"}
    front = [
        Alternative(schedule=ResolvedSchedule(num_chunks=count), step_seconds=1 / count, role=role, **shared)
        for count, role in ((7, "chosen"), (13, "pareto"))
    ]
    plot_footprint(plan.model_copy(update={"pareto": front}), make_timeline(24 * GIB), path)
    svg = path.read_text()
    for words in ("schedules worth a look", "upper bound of the device", "chosen", "13", "peak of each chunk"):
        assert f"<!-- {words}" in svg or words in svg
    plot_footprint(plan, make_timeline(24 * GIB), path)
    assert "schedules worth a look" not in path.read_text()
