"""The GPU catalog: lookup by id, alias or driver name; what this machine has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from typing import Any

from chunkplan.engine.errors import InputError
from chunkplan.planner.catalog._data import did_you_mean, load
from chunkplan.planner.catalog._host import host_as_gpu
from chunkplan.planner.spec import GpuSpec

MIB = 1024**2
_BRANDS = frozenset({"nvidia", "geforce", "tesla", "quadro", "amd", "instinct", "radeon", "graphics", "gpu"})
_MEMORY_TOLERANCE = 0.06
"""Drivers differ by a few per cent in the total of one card (ECC, reserved regions); other memory sizes by
more."""


def gpus() -> list[GpuSpec]:
    """Every catalog row, in the file's order: consumer, Apple, workstation, data centre. ``name`` is the
    catalog id.
    """
    return list(_by_id().values())


def find_gpu(ref: str | GpuSpec) -> GpuSpec:
    """The device that ``ref`` names: a catalog id, a common or driver name, ``cpu`` (this machine), or
    itself.

    Raises:
        InputError: no such device; names near matches.
    """
    if isinstance(ref, GpuSpec):
        return ref
    key = _normalise(ref)
    if key == "cpu":
        return host_as_gpu()
    found = _lookup(key)
    if found is None:
        hint = did_you_mean(key, _by_id())
        raise InputError("gpu", f"no GPU named {ref!r} in the catalog{hint or '; `chunkplan gpus` lists them'}")
    return found


def detect_gpu() -> GpuSpec:
    """The first device of :func:`detect_gpus`; ``cpu`` when there is none. Raises as that does."""
    return next(iter(detect_gpus()), None) or host_as_gpu()


def detect_gpus() -> list[GpuSpec]:
    """The CUDA devices that this process may use, as the driver describes them, in the order of their
    numbers.

    Rates come from the catalog, memory from the driver. A device that the catalog lacks gets modest default
    rates.

    Raises:
        InputError: the process sees a slice of a GPU (MIG), whose memory the driver's tool does not list.
    """
    return [_described(*device) for device in _driver_devices()]


def _described(name: str, memory_bytes: int, compute_capability: str) -> GpuSpec:
    spec = _match(name, memory_bytes)
    if spec is not None:
        return spec.model_copy(
            update={"memory_bytes": memory_bytes, "source": f"{spec.source}; memory from this machine's driver"}
        )
    return GpuSpec(
        name=name,
        memory_bytes=memory_bytes,
        compute_capability=compute_capability,
        source="this machine's driver; rates are modest defaults",
    )


@cache
def _by_id() -> dict[str, GpuSpec]:
    return {row["id"]: _spec(row) for row in load("gpus.json")}


@cache
def _by_alias() -> dict[str, str]:
    names = {row["id"]: row["id"] for row in load("gpus.json")}
    return names | {alias: row["id"] for row in load("gpus.json") for alias in row["aliases"]}


def _spec(row: dict[str, Any]) -> GpuSpec:
    return GpuSpec(
        name=row["id"],
        memory_bytes=row["memory_mib"] * MIB,
        kind=row["kind"],
        vendor=row["vendor"],
        compute_capability=row["compute_capability"],
        memory_bandwidth=row["bandwidth_gb_per_s"] * 1e9,
        bf16_flops=row["bf16_tflops"] * 1e12,
        fp16_flops=row["fp16_tflops"] * 1e12 if "fp16_tflops" in row else None,
        fp32_flops=row["fp32_tflops"] * 1e12,
        link_bandwidth=row["link_gb_per_s"] * 1e9,
        power_watts=row["power_watts"],
        price_usd=row.get("launch_usd"),
        price_source=f"list price, {row['launch_month']}" if "launch_usd" in row else None,
        rent_usd_per_hour=row.get("rent_usd_per_hour"),
        rent_source=f"{row['rent_month']}, {row['rent_source']}" if "rent_usd_per_hour" in row else None,
        source=row["source"],
    )


def _normalise(name: str) -> str:
    """``NVIDIA GeForce RTX 4080Super`` → ``rtx-4080-super``: lower case, hyphens, without brand words."""
    spaced = re.sub(r"(?<=\d)(?=(ti|super)\b)", " ", name.lower())
    words = re.sub(r"[^a-z0-9.]+", " ", spaced).split()
    return "-".join(word for word in words if word not in _BRANDS) or name.lower()


def _lookup(key: str) -> GpuSpec | None:
    """A row by normalised name; ``4090`` and ``rtx4090`` mean ``rtx-4090``."""
    spaced = re.sub(r"^(rtx|gtx)(?=\d)", r"\1-", key)
    for candidate in (spaced, f"rtx-{spaced}"):
        if (identity := _by_alias().get(candidate)) is not None:
            return _by_id()[identity]
    return None


def _match(name: str, memory_bytes: int) -> GpuSpec | None:
    """The catalog row for a driver's device name; the memory decides between rows of one name (RTX 3080)."""
    key = _normalise(name)
    exact = _lookup(key)
    candidates = [exact] if exact is not None else []
    candidates += [spec for identity, spec in _by_id().items() if identity.startswith(f"{key}-")]
    for spec in candidates:
        if abs(spec.memory_bytes - memory_bytes) <= _MEMORY_TOLERANCE * spec.memory_bytes:
            return spec
    return None


def _driver_devices() -> list[tuple[str, int, str]]:
    """(name, memory bytes, compute capability) of the devices that nvidia-smi lists and this
    process may see.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.startswith("MIG"):
        raise InputError("gpu", "a MIG slice cannot be detected; give its name and memory_bytes")
    tool = shutil.which("nvidia-smi")
    if tool is None or (visible is not None and visible.strip() in {"", "-1", "NoDevFiles"}):
        return []
    command = [tool, "--query-gpu=index,uuid,name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    rows = [row for row in rows if len(row) == 5 and row[3].isdigit()]
    if visible is not None:
        rows = list(_visible(rows, visible.split(",")))
    return [(row[2], int(row[3]) * MIB, row[4]) for row in rows]


def _visible(rows: list[list[str]], names: list[str]) -> Iterator[list[str]]:
    """The rows that CUDA_VISIBLE_DEVICES names, by number or by the start of the UUID, up to the first
    unknown one.
    """
    for name in map(str.strip, names):
        found = next((row for row in rows if name == row[0] or _begins(row[1], name)), None)
        if found is None:
            return
        yield found


def _begins(uuid: str, name: str) -> bool:
    return name.startswith("GPU-") and uuid.startswith(name)
