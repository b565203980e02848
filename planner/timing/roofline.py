"""Seconds from FLOPs and bytes: a roofline per operation, with efficiencies in one table. Pure: no I/O.

An operation takes the longest of: its FLOPs at the achievable rate, its bytes at the achievable bandwidth,
and the time that eager PyTorch needs to issue it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from chunkplan.engine.spec import Precision
from chunkplan.planner.spec import GpuSpec


@dataclass(frozen=True)
class _Efficiency:
    """Achievable shares of the catalog's peak rates."""

    matmul: float
    source: str


_MAMF = "ml-engineering, maximum achievable matmul FLOPS table"
_SHAPES = "less a tenth for shapes that are not the best one"
_MATMUL = {
    "8.0": _Efficiency(0.75, f"A100 85.9 %: {_MAMF}, {_SHAPES}"),
    "9.0": _Efficiency(0.70, f"H100 80.1 %: {_MAMF}, {_SHAPES}"),
    "10.0": _Efficiency(0.68, f"B200 77.6 %: {_MAMF}, {_SHAPES}"),
    "gfx90a": _Efficiency(0.65, f"MI250X 76.7 %: {_MAMF}, {_SHAPES}"),
    "gfx942": _Efficiency(0.50, f"MI300X 60.1 %: {_MAMF}, {_SHAPES}"),
    "gfx950": _Efficiency(0.50, "unmeasured: as gfx942"),
    "gfx1100": _Efficiency(0.50, "unmeasured: as gfx942"),
    "gfx1201": _Efficiency(0.50, "unmeasured: as gfx942"),
}
_MATMUL_DEFAULT = _Efficiency(
    0.75, "unmeasured: GeForce and workstation cards, whose fp32-accumulate rate is half of what the units can do"
)
MATMUL_FP32_EFFICIENCY = 0.72
"""fp32 products without TF32 (PyTorch's default). H100 NVL reached 45.5 of 60.3 TFLOP/s in a public
measurement."""
BANDWIDTH_EFFICIENCY = 0.80
"""Share of the memory bandwidth that streaming kernels reach. Public measurement: 90 % on H100 NVL for plain
copies."""
CUDA_LAUNCH_SECONDS = 4e-6
"""Least time per eager operation on CUDA: the interpreter issues one in about 4 µs (public measurement: 4.2
µs)."""
CPU_CALL_SECONDS = 1.5e-6
"""Least time per operation on the CPU: measured 1.0 µs for an addition of eight numbers, torch 2.13."""


@dataclass(frozen=True)
class Rates:
    """What a device achieves at one precision."""

    flops: float
    """FLOP/s in matrix products."""
    bandwidth: float
    """Bytes/s of device memory traffic."""
    floor_seconds: float
    """Least time of any operation."""

    def op_seconds(self, flops: int, moved_bytes: int) -> float:
        """Time of one operation that computes ``flops`` and reads and writes ``moved_bytes`` together."""
        return max(flops / self.flops, moved_bytes / self.bandwidth, self.floor_seconds)

    def seconds(self, work: Iterable[tuple[int, int, int]]) -> float:
        """Seconds of operations one after another, given as (FLOPs, bytes moved, how many such)."""
        return sum(self.op_seconds(flops, moved_bytes) * count for flops, moved_bytes, count in work)


def rates(precision: Precision, gpu: GpuSpec) -> Rates:
    """Achievable rates; the CPU's catalog rates are achievable ones already."""
    half = gpu.fp16_flops or gpu.bf16_flops if precision is Precision.FP16 else gpu.bf16_flops
    peak_flops = gpu.fp32_flops if precision is Precision.FP32 else half
    if gpu.kind == "cpu":
        return Rates(peak_flops, gpu.memory_bandwidth, CPU_CALL_SECONDS)
    matmul = _MATMUL.get(gpu.compute_capability or "", _MATMUL_DEFAULT).matmul
    efficiency = MATMUL_FP32_EFFICIENCY if precision is Precision.FP32 else matmul
    return Rates(peak_flops * efficiency, gpu.memory_bandwidth * BANDWIDTH_EFFICIENCY, CUDA_LAUNCH_SECONDS)
