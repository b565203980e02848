"""Draws a plan: live memory by category over one cycle, the capacity, each chunk's peaks, the front. No
torch.

Two panels share the time axis. The upper one leaves the weights out, which are constant and would flatten
everything else; the middle one shows all memory against the capacity. Below: each chunk's peak in each phase,
and what ``auto`` found.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from chunkplan.planner.spec import Plan, Timeline, TimelinePoint

GIBIBYTE = 1 << 30
_INK, _MUTED, _GRID, _CAPACITY = "#1f2933", "#697586", "#e4e7eb", "#c0392b"
# From what stays to what comes and goes. Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = {
    "weights": "#0072b2",
    "optimizer_states": "#56b4e9",
    "gradients": "#009e73",
    "activations": "#e69f00",
    "loss": "#d55e00",
    "workspace": "#cc79a7",
    "other": "#999999",
}
_PHASE_MARKS = {"forward": ("o", "#0072b2"), "backward": ("s", "#d55e00"), "optimizer": ("^", "#009e73")}
_ABOVE_WEIGHTS = [category for category in _COLOURS if category != "weights"]
_LABEL_SHARE = 0.035
"""Share of the axis that a chunk's number needs."""


def plot_footprint(plan: Plan, timeline: Timeline, path: Path) -> None:
    """Write the picture; the suffix of ``path`` decides the format (png, svg, pdf).

    Args:
        plan: what the picture is of.
        timeline: its footprint over one cycle.
        path: the file.
    """
    _draw(plan, timeline).savefig(path)


def picture(plan: Plan, timeline: Timeline, form: Literal["png", "svg"]) -> bytes:
    """The content of the file that :func:`plot_footprint` would write; the same for the same plan."""
    content = io.BytesIO()
    with rc_context({"svg.hashsalt": plan.id}):
        _draw(plan, timeline).savefig(content, format=form, metadata={"Date": None} if form == "svg" else None)
    return content.getvalue()


def _draw(plan: Plan, timeline: Timeline) -> Figure:
    panels = [draw for draw, is_due in ((_chunk_peaks, len(plan.chunks) > 1), (_front, len(plan.pareto) > 1)) if is_due]
    figure = Figure(figsize=(11, 6.4 + 2.4 * len(panels)), dpi=160, facecolor="white", layout="constrained")
    grid = figure.add_gridspec(2 + len(panels), 1, height_ratios=[3, 1.25, *[1.5] * len(panels)])
    upper = figure.add_subplot(grid[0])
    lower = figure.add_subplot(grid[1], sharex=upper)
    upper.tick_params(labelbottom=False)
    end = sum(chunk.step_seconds for chunk in plan.chunks)
    _stack(upper, timeline.points, _ABOVE_WEIGHTS, end)
    _stack(lower, timeline.points, list(_COLOURS), end)
    _mark_peak(upper, timeline)
    _mark_chunks(upper, lower, timeline)
    _mark_capacity(lower, plan, timeline)
    _label(figure, upper, lower, plan)
    for row, draw in enumerate(panels, start=2):
        draw(figure.add_subplot(grid[row]), plan)
    return figure


def _stack(axes: Axes, points: Sequence[TimelinePoint], categories: Sequence[str], end: float) -> None:
    """Stacked areas; a point holds until the next one, the last one until the end of the cycle."""
    seconds = np.array([point.seconds for point in points])
    edges = np.append(seconds, max(end, seconds[-1]))
    below = np.zeros(len(edges))
    for category in categories:
        values = np.array([getattr(point.breakdown, category) for point in points]) / GIBIBYTE
        if not values.any():
            continue
        top = below + np.append(values, values[-1])
        label = category.replace("_", " ")
        axes.fill_between(edges, below, top, step="post", color=_COLOURS[category], linewidth=0, label=label)
        below = top
    axes.step(edges, below, where="post", color=_INK, linewidth=0.5)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, float(below.max()) * 1.16 or 1.0)


def _mark_peak(axes: Axes, timeline: Timeline) -> None:
    highest = max(timeline.points, key=lambda point: point.allocated_bytes)
    top = (highest.allocated_bytes - highest.breakdown.weights) / GIBIBYTE
    is_late = highest.seconds > sum(axes.get_xlim()) / 2
    axes.plot(highest.seconds, top, marker="v", markersize=6, color=_INK, clip_on=False)
    axes.annotate(
        f"peak {highest.allocated_bytes / GIBIBYTE:.2f} GiB with the weights · "
        f"chunk {highest.chunk_index}, {highest.phase}",
        (highest.seconds, top),
        xytext=(-8 if is_late else 8, 6),
        textcoords="offset points",
        ha="right" if is_late else "left",
        fontsize=8.5,
        color=_INK,
    )


def _mark_chunks(upper: Axes, lower: Axes, timeline: Timeline) -> None:
    """A light line where a chunk becomes active, and its number where there is room."""
    starts = [
        (point.seconds, point.chunk_index)
        for previous, point in zip([None, *timeline.points], timeline.points, strict=False)
        if previous is None or previous.chunk_index != point.chunk_index
    ]
    begin, end = upper.get_xlim()
    next_label = begin
    for seconds, index in starts:
        for axes in (upper, lower):
            axes.axvline(seconds, color="white", linewidth=0.5, alpha=0.7)
        if seconds >= next_label:
            is_first = seconds == begin
            next_label = seconds + (end - begin) * _LABEL_SHARE * (2 if is_first else 1)
            upper.annotate(
                f"chunk {index}" if is_first else str(index),
                (seconds, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(2, 3),
                textcoords="offset points",
                fontsize=7,
                color=_MUTED,
            )


def _mark_capacity(axes: Axes, plan: Plan, timeline: Timeline) -> None:
    """The capacity as a line; in words where it is so far above that the footprint would be a stripe."""
    peak = max(point.allocated_bytes for point in timeline.points) / GIBIBYTE
    capacity = plan.capacity_bytes / GIBIBYTE
    is_near = capacity < 4 * peak
    top = max(peak, capacity if is_near else peak) * 1.3
    axes.set_ylim(0, top)
    if is_near:
        axes.axhline(capacity, color=_CAPACITY, linewidth=1.3, linestyle=(0, (6, 3)))
    axes.annotate(
        f"capacity {capacity:.2f} GiB" + ("" if is_near else " ↑"),
        (1.0, capacity if is_near else top * 0.97),
        xycoords=("axes fraction", "data"),
        xytext=(-6, 3 if is_near else 0),
        textcoords="offset points",
        ha="right",
        va="bottom" if is_near else "top",
        fontsize=8.5,
        color=_CAPACITY,
    )


def _chunk_peaks(axes: Axes, plan: Plan) -> None:
    """Each chunk's highest moment in each phase, above the weights."""
    weights = plan.model.parameter_bytes
    indices = [chunk.index for chunk in plan.chunks]
    for phase, (marker, colour) in _PHASE_MARKS.items():
        peaks = [chunk.phase_peak_bytes.get(phase) for chunk in plan.chunks]
        above = [float("nan") if peak is None else (peak - weights) / GIBIBYTE for peak in peaks]
        axes.plot(
            indices, above, marker=marker, markersize=4 if len(indices) <= 64 else 2, linewidth=0.8, color=colour,
            label=phase,
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.5, len(indices) - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("peak of each chunk's step, by phase", loc="left", fontsize=9.5, color=_MUTED)
    axes.set_xlabel("chunk, from the embedding to the head", color=_MUTED)
    axes.set_ylabel("GiB on top\nof the weights", color=_MUTED)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, labelcolor=_INK)
    _style(axes)


def _front(axes: Axes, plan: Plan) -> None:
    """What ``auto`` found: no point is both faster and smaller than another one, unless it takes more of the
    host.
    """
    capacity = plan.capacity_bytes / GIBIBYTE
    for is_chosen in (False, True):
        members = [member for member in plan.pareto if (member.role == "chosen") == is_chosen]
        if not members:
            continue
        axes.scatter(
            [member.peak.upper_bytes / GIBIBYTE for member in members],
            [member.step_seconds for member in members],
            marker="*" if is_chosen else "o",
            s=120 if is_chosen else 26,
            color="#d55e00" if is_chosen else "#0072b2",
            label="chosen" if is_chosen else "others",
            zorder=3,
        )
    for member in plan.pareto:
        axes.annotate(
            f"{member.schedule.num_chunks}",
            (member.peak.upper_bytes / GIBIBYTE, member.step_seconds),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=7,
            color=_MUTED,
        )
    if capacity < 1.6 * axes.get_xlim()[1]:
        axes.axvline(capacity, color=_CAPACITY, linewidth=1.3, linestyle=(0, (6, 3)))
        axes.annotate(
            f"capacity {capacity:.2f} GiB ",
            (capacity, 0.97),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="top",
            fontsize=8.5,
            color=_CAPACITY,
        )
    axes.set_ylim(bottom=0)
    axes.set_title("schedules worth a look, each with its number of chunks", loc="left", fontsize=9.5, color=_MUTED)
    axes.set_xlabel("upper bound of the device's memory, GiB", color=_MUTED)
    axes.set_ylabel("seconds per update", color=_MUTED)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, labelcolor=_INK)
    _style(axes)


def _style(axes: Axes) -> None:
    axes.tick_params(colors=_MUTED, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRID)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _label(figure: Figure, upper: Axes, lower: Axes, plan: Plan) -> None:
    training = plan.request.training
    schedule = plan.schedule
    chunks = f", {schedule.num_chunks} chunks {schedule.order.value}" if schedule.num_chunks > 1 else ""
    batch = f"batch {training.micro_batch_size} × {training.seq_len} tokens"
    verdict = "fits" if plan.fits else "does not fit"
    title = f"{plan.model.name} on {plan.device_name}: {verdict}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=_INK)
    subtitle = f"{training.precision.value}, {training.optimizer}, {batch}{chunks}; one cycle"
    upper.set_title(f"{subtitle}\n", loc="left", fontsize=9.5, color=_MUTED)
    upper.set_ylabel("GiB on top of the weights", color=_MUTED)
    lower.set_ylabel("GiB, all", color=_MUTED)
    lower.set_xlabel("seconds since the start of the cycle", color=_MUTED)
    for axes in (upper, lower):
        _style(axes)
    handles, labels = lower.get_legend_handles_labels()
    upper.legend(
        handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, labelcolor=_INK
    )
