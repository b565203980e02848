"""What no trace shows, in one table: context, library workspaces, kernel scratch, the process itself.

Every row says where its number comes from; ``GpuSpec.context_bytes`` overrides the context. Bytes. No I/O.
"""

from __future__ import annotations

from dataclasses import dataclass

from chunkplan.planner.spec import GpuSpec

MIB = 1024**2

DEFAULT_CUDA_VERSION = "13.0"
"""CUDA version of the torch 2.13 wheels from PyPI."""
NUM_CUBLAS_WORKSPACES = 2
"""One per thread and stream that multiplies: the main thread (forward) and autograd's (backward,
recomputation)."""

ONEDNN_SCRATCH_BYTES = 193 * 1024
"""Buffers of one bf16 product on the CPU, per thread. Measured: the largest of 12 shapes, AVX-512, torch
2.13."""
ONEDNN_TRANSPOSED_BYTES = 914
"""Buffers with a transposed left matrix (a weight's gradient), per element of the inner dimension."""
ONEDNN_TRANSPOSED_MAX_BYTES = 914 * 1024
"""Where that stops to grow. Measured at inner dimensions 1024 and 2048."""
FILE_ITEMSIZE = 2
"""Bytes per parameter of the weights' file, whose pages are resident while they are read; nearly all are
bf16."""


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """Bytes outside of the traced tensors."""

    context_bytes: int
    """On the device, outside of the allocator: CUDA context and the kernels that a training step loads. CPU:
    0."""
    workspace_bytes: int
    """One matrix-multiplication workspace, allocated through the caching allocator at the first product. CPU:
    0."""
    num_workspaces: int
    """How many of them live for the whole run."""
    runtime_bytes: int
    """Host memory of the process with torch and transformers loaded, before any model. Not allocated bytes.
    """
    driver_reserved_bytes: int
    """Part of ``GpuSpec.memory_bytes`` that no process gets: nvidia-smi's total less cudaMemGetInfo's. CPU:
    0."""
    sources: dict[str, str]
    """Where each number comes from, by field name."""


@dataclass(frozen=True)
class _Row:
    """One constant: for a compute capability (None: any), from a CUDA version and a device memory on."""

    compute_capability: str | None
    mib: float
    source: str
    cuda_version: str = "0"
    from_memory_mib: int = 0


_CONTEXT = (
    _Row("7.0", 320, "estimate: sm_75 scaled by its 80 multiprocessors"),
    _Row("7.5", 256, "estimate: sm_86 at CUDA 12.8"),
    _Row("8.0", 460, "unmeasured; between sm_86 and sm_90, 108 multiprocessors"),
    _Row("8.6", 256, "RTX 3090, CUDA 12.8, bare context: github.com/invoke-ai/InvokeAI issue 9413", "12.8"),
    _Row("8.6", 340, "estimate: the CUDA 12.8 value scaled as sm_89 grew with CUDA 13", "13.0"),
    _Row("8.9", 426, "RTX 6000 Ada, CUDA 13.0: github.com/unslothai/unsloth-zoo pull 1053"),
    _Row("9.0", 560, "unmeasured; upper end of the 0.4-0.6 GiB that issue reports give for data-centre cards"),
    _Row("10.0", 640, "unmeasured; sm_90 scaled by 148 multiprocessors"),
    _Row("12.0", 340, "RTX 5060 Ti: nvidia-smi less torch's allocated bytes in public logs, 334 MiB"),
    _Row(
        "12.0", 620, "RTX 5090: NVML less reserved (published_peaks P13, P14) less the driver", from_memory_mib=24_000
    ),
    _Row("gfx90a", 640, "unmeasured; the largest CUDA value"),
    _Row("gfx942", 640, "unmeasured; the largest CUDA value"),
)

_CUBLAS_SOURCE = (
    "aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize (:4096:2:16:8; 32 MiB on Hopper, Blackwell)"
)
_WORKSPACE = (
    *(_Row(capability, 8.125, _CUBLAS_SOURCE) for capability in ("7.0", "7.5", "8.0", "8.6", "8.9")),
    *(_Row(capability, 32, _CUBLAS_SOURCE) for capability in ("9.0", "10.0", "12.0")),
    _Row("gfx90a", 32 + 76, "the same file: hipBLAS 32 MiB and hipBLASLt 76 MiB, not unified"),
    _Row("gfx942", 128 + 76, "the same file: hipBLAS 128 MiB and hipBLASLt 76 MiB, not unified"),
)

_OOM = "nvidia-smi total less the capacity in public torch OOM messages"
_DRIVER = (
    _Row("7.0", 277, f"V100 32 GB: 32768 MiB, 31.73 GiB; {_OOM}"),
    _Row("7.5", 451, f"T4: 15360 MiB, 14.56 GiB; {_OOM}"),
    _Row("8.0", 881, f"A100 80 GB: 81920 MiB, 79.14 GiB; {_OOM}"),
    _Row("8.6", 379, f"RTX 3060: 12288 MiB, 11.63 GiB, RTX 3090: 24576 MiB, 23.69 GiB; {_OOM}"),
    _Row("8.6", 480, f"A40: 46068 MiB, 44.52 GiB; {_OOM}", from_memory_mib=40_000),
    _Row("8.9", 434, f"RTX 4070: 12282 MiB, 11.57 GiB; {_OOM}"),
    _Row("8.9", 357, f"RTX 4090: 24564 MiB, 23.64 GiB; {_OOM}", from_memory_mib=24_000),
    _Row("8.9", 631, "RTX 6000 Ada: 49140 MiB, 50865307648 B (unsloth-zoo pull 1053)", from_memory_mib=40_000),
    _Row("9.0", 616, f"H200: 143771 MiB, 139.80 GiB; H100: 81559 MiB, 79.10 GiB; {_OOM}"),
    _Row("10.0", 729, f"B200: 183359 MiB, 178.35 GiB; {_OOM}"),
    _Row("12.0", 494, f"RTX 5090: 32607 MiB, 31.36 GiB, RTX 5060 Ti: 16311 MiB, 15.46 GiB; {_OOM}"),
    _Row("12.0", 638, f"RTX PRO 6000: 97887 MiB, 94.97 GiB; {_OOM}", from_memory_mib=40_000),
    _Row("gfx90a", 0, "rocm-smi and torch report the same total"),
    _Row("gfx942", 0, "rocm-smi and torch report the same total"),
)

_RUNTIME_CPU = _Row(
    None, 341, "measured: resident set after importing torch 2.13 (CPU wheel), transformers 5.23 and one model class"
)
_RUNTIME_CUDA = _Row(
    None, 1365, "the CPU value plus 1 GiB: pytorch issue 113326 reports 0.1 to 1.7 GiB for CUDA start-up"
)


def overheads(gpu: GpuSpec) -> Overheads:
    """The constants for a device: what the spec gives, else the table's row for its generation and CUDA
    version.

    An unknown compute capability gets the table's largest values.
    """
    version = gpu.cuda_version or DEFAULT_CUDA_VERSION
    tables = {"context_bytes": _CONTEXT, "workspace_bytes": _WORKSPACE, "driver_reserved_bytes": _DRIVER}
    if gpu.kind == "cpu":
        rows = {name: _Row(None, 0, "the CPU has none") for name in tables} | {"runtime_bytes": _RUNTIME_CPU}
    else:
        rows = {name: _pick(table, gpu, version) for name, table in tables.items()} | {"runtime_bytes": _RUNTIME_CUDA}
    given = {name: getattr(gpu, name) for name in rows}
    return Overheads(
        num_workspaces=0 if gpu.kind == "cpu" else NUM_CUBLAS_WORKSPACES,
        sources={name: row.source if given[name] is None else "given with the GPU" for name, row in rows.items()},
        **{name: _bytes(row) if given[name] is None else given[name] for name, row in rows.items()},
    )


def _pick(rows: tuple[_Row, ...], gpu: GpuSpec, cuda_version: str) -> _Row:
    """The row of the device's capability with the newest CUDA version and the largest memory that do not
    exceed it.
    """
    own = [row for row in rows if row.compute_capability == gpu.compute_capability]
    if not own:
        is_rocm = gpu.kind == "rocm"
        largest = max((row for row in rows if _is_rocm(row) == is_rocm), key=lambda row: row.mib)
        return _Row(None, largest.mib, f"no value for compute capability {gpu.compute_capability}: the table's largest")
    fitting = [
        row
        for row in own
        if _version(row.cuda_version) <= _version(cuda_version) and row.from_memory_mib * MIB <= gpu.memory_bytes
    ]
    return max(fitting or own[:1], key=lambda row: (_version(row.cuda_version), row.from_memory_mib))


def _is_rocm(row: _Row) -> bool:
    return (row.compute_capability or "").startswith("gfx")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _bytes(row: _Row) -> int:
    return round(row.mib * MIB)
