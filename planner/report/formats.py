"""A plan's footprint in the formats of other tools: JSON, Chrome and Perfetto traces, memory snapshots,
pictures.

No torch unless the plan was never traced. Every export is computed anew from the plan's request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from chunkplan.engine.errors import InputError
from chunkplan.planner.spec import Breakdown, Plan, Timeline, TimelinePoint

Format = Literal["json", "perfetto", "memory_snapshot", "svg", "png"]
FORMATS: tuple[str, ...] = get_args(Format)
TIMELINE_SUFFIXES: dict[str, Format] = {
    ".perfetto.json": "perfetto",
    ".json": "json",
    ".pickle": "memory_snapshot",
}
"""By which the name of a file says its format; the first that matches."""

_MICROSECONDS = 1e6
_CHUNKS, _PHASES, _LAYERS = 1, 2, 3
"""Tracks of a trace."""


def format_of(path: Path) -> Format:
    """The format of a timeline that a file's name asks for.

    Raises:
        InputError: none does.
    """
    for suffix, form in TIMELINE_SUFFIXES.items():
        if path.name.lower().endswith(suffix):
            return form
    raise InputError("timeline", f"must end in {', '.join(TIMELINE_SUFFIXES)} (got {str(path)!r})")


def export(planned: Plan, form: Format, chunk_index: int | None = None) -> bytes:
    """The footprint of a plan in a format.

    Args:
        planned: the plan.
        form: ``json``: the timeline's points; ``perfetto``: a trace for ui.perfetto.dev and chrome://tracing;
            ``memory_snapshot``: one chunk's allocations for pytorch.org/memory_viz; ``svg``, ``png``: the
            picture.
        chunk_index: of a memory snapshot; default: the chunk with the peak.

    Raises:
        InputError: no such chunk, or a chunk where all are exported.
    """
    from chunkplan import planner

    if form == "memory_snapshot":
        return _snapshot(planned, planned.peak.chunk_index if chunk_index is None else chunk_index)
    if chunk_index is not None:
        raise InputError("chunk", "only a memory snapshot is of one chunk")
    timeline = planner.timeline(planned.request)
    if form == "json":
        return timeline.model_dump_json().encode()
    if form == "perfetto":
        return json.dumps(trace_events(planned, timeline), allow_nan=False, separators=(",", ":")).encode()
    from chunkplan.planner.report.plot import picture

    return picture(planned, timeline, form)


def _snapshot(planned: Plan, chunk_index: int) -> bytes:
    from chunkplan.planner.report.snapshot import snapshot, to_pickle
    from chunkplan.planner.search.evaluator import Evaluator

    if not 0 <= chunk_index < len(planned.chunks):
        raise InputError("chunk", f"must be between 0 and {len(planned.chunks) - 1} (got {chunk_index})")
    evaluator = Evaluator(planned.request)
    training = planned.request.training.resolved(planned.schedule)
    footprints = evaluator.footprints(training)
    chunks = [footprints.of_chunk(chunk, planned.schedule) for chunk in footprints.chunks(planned.schedule.num_chunks)]
    return to_pickle(snapshot(footprints, chunks, planned.schedule, evaluator.overheads, chunk_index))


def trace_events(planned: Plan, timeline: Timeline) -> dict[str, Any]:
    """The footprint in the Trace Event Format: a counter per category, and slices for chunks, phases and
    layers.

    Microseconds since the start of the cycle; counters are bytes, each holding until its next event.
    """
    ends = _ends(planned, timeline.points)
    events = [*_names(planned), *_counters(timeline, ends[-1])]
    for track, key in ((_CHUNKS, _chunk_of), (_PHASES, _phase_of), (_LAYERS, _layer_of)):
        events += _slices(timeline.points, ends, track, key)
    highest = max(timeline.points, key=lambda point: point.allocated_bytes)
    events.append(
        {
            "name": f"peak {highest.allocated_bytes} bytes",
            "ph": "i",
            "s": "g",
            "pid": 1,
            "tid": _LAYERS,
            "ts": highest.seconds * _MICROSECONDS,
            "args": highest.breakdown.model_dump(),
        }
    )
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "plan_id": planned.id,
            "model": planned.model.name,
            "device": planned.device_name,
            "capacity_bytes": str(planned.capacity_bytes),
        },
    }


def _ends(planned: Plan, points: Sequence[TimelinePoint]) -> list[float]:
    """When each point ends, in seconds: when the next one begins, or its chunk's step is over."""
    seconds = {chunk.index: chunk.step_seconds for chunk in planned.chunks}
    ends, begin = [], 0.0
    for position, point in enumerate(points):
        following = points[position + 1] if position + 1 < len(points) else None
        if following is None or following.chunk_index != point.chunk_index:
            begin += seconds[point.chunk_index]
            ends.append(max(begin, point.seconds))
        else:
            ends.append(following.seconds)
    return ends


def _names(planned: Plan) -> Iterator[dict[str, Any]]:
    titles = {_CHUNKS: "chunks", _PHASES: "phases", _LAYERS: "layers"}
    process = f"{planned.model.name} on {planned.device_name}, planned"
    yield {"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": process}}
    for track, title in titles.items():
        yield {"name": "thread_name", "ph": "M", "pid": 1, "tid": track, "args": {"name": title}}
        yield {"name": "thread_sort_index", "ph": "M", "pid": 1, "tid": track, "args": {"sort_index": track}}


def _counters(timeline: Timeline, end: float) -> Iterator[dict[str, Any]]:
    def counter(name: str, seconds: float, values: dict[str, int]) -> dict[str, Any]:
        return {"name": name, "ph": "C", "pid": 1, "tid": 0, "ts": seconds * _MICROSECONDS, "args": values}

    for point in timeline.points:
        yield counter("live bytes", point.seconds, point.breakdown.model_dump())
        yield counter("allocated bytes", point.seconds, {"allocated": point.allocated_bytes})
    yield counter("live bytes", end, dict.fromkeys(Breakdown.model_fields, 0))
    yield counter("allocated bytes", end, {"allocated": 0})
    for seconds in (0.0, end):
        yield counter("capacity bytes", seconds, {"capacity": timeline.capacity_bytes})


def _chunk_of(point: TimelinePoint) -> str:
    return f"chunk {point.chunk_index}"


def _phase_of(point: TimelinePoint) -> str:
    return point.phase


def _layer_of(point: TimelinePoint) -> str:
    return point.segment


def _slices(
    points: Sequence[TimelinePoint], ends: Sequence[float], track: int, name_of: Any
) -> Iterator[dict[str, Any]]:
    """Neighbouring points of the same name, chunk and phase as one slice; phases split layers, chunks split
    all.
    """
    first = 0
    for position, point in enumerate(points):
        following = points[position + 1] if position + 1 < len(points) else None
        if following is not None and _group(following, track, name_of) == _group(point, track, name_of):
            continue
        begin, end = points[first].seconds, ends[position]
        yield {
            "name": name_of(point),
            "cat": point.phase if track != _CHUNKS else "chunk",
            "ph": "X",
            "pid": 1,
            "tid": track,
            "ts": begin * _MICROSECONDS,
            "dur": (end - begin) * _MICROSECONDS,
            "args": {
                "chunk": point.chunk_index,
                "highest_allocated_bytes": max(p.allocated_bytes for p in points[first : position + 1]),
            },
        }
        first = position + 1


def _group(point: TimelinePoint, track: int, name_of: Any) -> tuple[object, ...]:
    return (point.chunk_index, point.phase if track != _CHUNKS else None, name_of(point))
