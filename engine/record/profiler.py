"""What a run's memory really did: the allocator's own record by phase, host memory, seconds.

On the CPU the record comes from torch's profiler: every memory event carries the allocator's running total.
It counts blocks allocated while a window is open, so the first window must be open while the model is loaded.
On CUDA it comes from torch.cuda's memory statistics. Nothing here looks at the planner: measured and
predicted come from different sources.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from chunkplan.engine.protocol import PhaseSample
from chunkplan.engine.torch_internals import (
    ExperimentalConfig,
    ProfilerActivity,
    ProfilerConfig,
    ProfilerEventType,
    ProfilerState,
    RecordScope,
    disable_profiler,
    enable_profiler,
    prepare_profiler,
)

_PHASE_PREFIX = "chunkplan."
# The profiler's library otherwise prints two lines to stderr for every window.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


@dataclass(frozen=True, slots=True)
class Sample:
    """Peaks in bytes, and seconds, of one phase of a step: maxima and total time where it ran repeatedly."""

    phase: str
    allocated_bytes: int
    reserved_bytes: int
    host_bytes: int
    seconds: float

    def reported(self) -> PhaseSample:
        """Return the sample as an event carries it."""
        return PhaseSample.model_validate(asdict(self))

    def merge(self, other: Sample) -> Sample:
        """The two samples of a phase as one."""
        return Sample(
            self.phase,
            max(self.allocated_bytes, other.allocated_bytes),
            max(self.reserved_bytes, other.reserved_bytes),
            max(self.host_bytes, other.host_bytes),
            self.seconds + other.seconds,
        )


class CpuProfiler:
    """Reads torch's CPU allocator by the profiler's memory events; without a cache, allocated is reserved."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._phases: list[tuple[str, int, float]] = []
        self._live_bytes = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Record one window; afterwards :attr:`samples` holds its phases."""
        config = ProfilerConfig(ProfilerState.KINETO, False, True, False, False, False, ExperimentalConfig())
        self._phases = []
        prepare_profiler(config, {ProfilerActivity.CPU})
        enable_profiler(config, {ProfilerActivity.CPU}, {RecordScope.USER_SCOPE})  # type: ignore[call-arg]
        try:
            yield
        except BaseException:
            disable_profiler()  # what broke off in a phase has no record, and must not be hidden by that
            raise
        self.samples = self._read(disable_profiler())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Mark the phase in the profiler's record; watch the process's high-water mark meanwhile."""
        reset_host_peak()
        begin = time.perf_counter()
        with record_function(_PHASE_PREFIX + name):
            yield
        self._phases.append((name, host_peak_bytes(), time.perf_counter() - begin))

    def _read(self, result: Any) -> list[Sample]:
        totals: list[tuple[int, int]] = []
        ranges: list[tuple[int, int, str]] = []
        pending = list(result.experimental_event_tree())
        while pending:
            event = pending.pop()
            pending.extend(event.children)
            kind, fields = event.typed
            if kind == ProfilerEventType.Allocation:
                totals.append((event.start_time_ns, fields.total_allocated))
            elif event.name.startswith(_PHASE_PREFIX):
                ranges.append((event.start_time_ns, event.end_time_ns, event.name.removeprefix(_PHASE_PREFIX)))
        peaks = self._peaks(sorted(totals), sorted(ranges))
        merged: dict[str, Sample] = {}
        for (name, host, seconds), peak in zip(self._phases, peaks, strict=True):
            sample = Sample(name, peak, peak, host, seconds)
            merged[name] = merged[name].merge(sample) if name in merged else sample
        return list(merged.values())

    def _peaks(self, totals: list[tuple[int, int]], ranges: list[tuple[int, int, str]]) -> list[int]:
        """Highest running total within each range; what was live when it began counts too."""
        peaks, position, live = [], 0, self._live_bytes
        for begin, end, _ in ranges:
            while position < len(totals) and totals[position][0] < begin:
                live = totals[position][1]
                position += 1
            peak = live
            while position < len(totals) and totals[position][0] <= end:
                live = totals[position][1]
                peak = max(peak, live)
                position += 1
            peaks.append(peak)
        self._live_bytes = totals[-1][1] if totals else live
        return peaks


class CudaProfiler:
    """Reads torch.cuda's allocator statistics at the borders of phases."""

    def __init__(self, device: torch.device) -> None:
        self.samples: list[Sample] = []
        self._device = device
        self._merged: dict[str, Sample] = {}

    @contextmanager
    def step(self) -> Iterator[None]:
        """One window; afterwards :attr:`samples` holds its phases."""
        self._merged = {}
        yield
        self.samples = list(self._merged.values())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Reset the peaks, run the phase to its end on the device, read the peaks."""
        reset_host_peak()
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        begin = time.perf_counter()
        yield
        torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - begin
        allocated = torch.cuda.max_memory_allocated(self._device)
        reserved = torch.cuda.max_memory_reserved(self._device)
        sample = Sample(name, allocated, reserved, host_peak_bytes(), seconds)
        self._merged[name] = self._merged[name].merge(sample) if name in self._merged else sample


def profiler_for(device: str) -> CpuProfiler | CudaProfiler:
    """The profiler of a device, ``cpu`` or ``cuda:N``."""
    return CpuProfiler() if device == "cpu" else CudaProfiler(torch.device(device))


_highest_bytes = 0


def process_peak_bytes() -> int:
    """Return this process's highest resident memory since it began, in bytes; 0 where nobody tells."""
    return max(_highest_bytes, host_peak_bytes())


def reset_host_peak() -> None:
    """Start the high-water mark of this process's resident memory anew (Linux; elsewhere it only rises)."""
    global _highest_bytes
    _highest_bytes = process_peak_bytes()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def host_peak_bytes() -> int:
    """High-water mark of this process's resident memory, bytes; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    line = next((row for row in status.splitlines() if row.startswith("VmHWM:")), None)
    return int(line.split()[1]) * 1024 if line else 0
