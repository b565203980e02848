"""The devices of this host."""

from __future__ import annotations

from dataclasses import dataclass

from planner.catalog import detect_gpu, find_gpu
from planner.spec import GpuSpec


@dataclass(frozen=True)
class Device:
    """One device that attempts can run on."""

    name: str
    """As the engine calls it: ``cpu`` or ``cuda:0``."""
    gpu: GpuSpec

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``: what a job asks for."""
        return self.gpu.kind

    @property
    def memory_bytes(self) -> int:
        """What one process can use of it."""
        return self.gpu.memory_bytes


def local_devices() -> list[Device]:
    """The accelerator of this host, if it has one, and its processor; the first is the default for jobs."""
    found = detect_gpu()
    processor = Device("cpu", find_gpu("cpu"))
    return [processor] if found.kind == "cpu" else [Device("cuda:0", found), processor]
