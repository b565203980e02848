"""This machine's processor and memory as a device, for ``"gpu": "cpu"``."""

from __future__ import annotations

import os
from pathlib import Path

from chunkplan.engine.arithmetic import ceil_div
from chunkplan.planner.spec import GpuSpec

CORE_FLOPS = 8e10
"""fp32 FLOP/s that one server core sustains in matrix products: 86 to 93 GFLOP/s measured on a 2.6 GHz Zen 5
core."""
BF16_UNIT_SPEEDUP = 4.0
"""Speed of bf16 products over fp32 ones on a core with bf16 instructions: 4.4 to 4.7 measured."""
CORE_BANDWIDTH = 4e9
"""Bytes/s of an eager operation on one core. Measured: 1.5 to 3.3 GB/s into fresh pages, 17 GB/s in place."""
SOCKET_BANDWIDTH = 1.0e11
"""Bytes/s at which the memory of a server socket saturates, whatever the number of cores."""


def host_as_gpu() -> GpuSpec:
    """This machine as a device: memory under its limits, modest rates scaled by the number of
    usable cores.
    """
    cores = usable_cores()
    bandwidth = min(SOCKET_BANDWIDTH, cores * CORE_BANDWIDTH)
    return GpuSpec(
        name="cpu",
        memory_bytes=memory_bytes(),
        kind="cpu",
        vendor="host",
        memory_bandwidth=bandwidth,
        bf16_flops=cores * CORE_FLOPS * (BF16_UNIT_SPEEDUP if _has_bf16_unit() else 1.0),
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
            allowed = min(allowed, ceil_div(int(quota), int(period)))
    return max(1, allowed)


def host_threads() -> int:
    """Threads that torch computes with on this host's CPU."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_bf16_unit() -> bool:
    flags = next((line for line in _read(Path("/proc/cpuinfo")).splitlines() if line.startswith("flags")), "")
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.split())


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
