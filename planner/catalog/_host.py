"""This machine's processor and memory as a device, for ``"gpu": "cpu"``."""

from __future__ import annotations

import os
from pathlib import Path

from planner.spec import GpuSpec

CORE_FLOPS = 8e10
"""fp32 FLOP/s of one core: what a 2.5-3 GHz server core with AVX2 sustains in a matrix product (AVX-512: 2 x)."""
CORE_BANDWIDTH = 1.2e10
"""Bytes/s of memory traffic that one core sustains."""
SOCKET_BANDWIDTH = 1.0e11
"""Bytes/s at which the memory of a server socket saturates, whatever the number of cores."""


def host_as_gpu() -> GpuSpec:
    """This machine as a device: memory under its limits, modest rates scaled by the number of usable cores.

    bf16 has the fp32 rate: without matrix units (AMX) a core gains nothing from it.
    """
    cores = usable_cores()
    bandwidth = min(SOCKET_BANDWIDTH, cores * CORE_BANDWIDTH)
    return GpuSpec(
        name="cpu",
        memory_bytes=memory_bytes(),
        kind="cpu",
        vendor="host",
        memory_bandwidth=bandwidth,
        bf16_flops=cores * CORE_FLOPS,
        fp32_flops=cores * CORE_FLOPS,
        link_bandwidth=bandwidth / 2,
        source="this machine",
    )


def memory_bytes() -> int:
    """Physical memory or the control group's limit, whichever is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_cgroup_memory_limits()])


def usable_cores() -> int:
    """Processors that this process may run on, at least one; a control group's quota lowers them."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroup_folders(""):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            allowed = min(allowed, -(-int(quota) // int(period)))
    return max(1, allowed)


def _cgroup_memory_limits() -> list[int]:
    """Every memory limit above this process, bytes: version 2 (memory.max) and version 1 files."""
    files = [folder / "memory.max" for folder in _cgroup_folders("")]
    files += [folder / "memory.limit_in_bytes" for folder in _cgroup_folders("memory")]
    return [int(text) for text in map(_read, files) if text.isdigit() and int(text) > 0]


def _cgroup_folders(controller: str) -> list[Path]:
    """This process's control group and its parents (``""``: the unified hierarchy), innermost first."""
    root = Path("/sys/fs/cgroup") / controller
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller == controllers or (controller and controller in controllers.split(",")):
            inner = root / path.lstrip("/")
            return [inner, *(parent for parent in inner.parents if parent.is_relative_to(root))]
    return [root]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
