"""The devices of this host, and which of them a job may run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import parse
from chunkplan.planner.catalog import detect_gpus, find_gpu
from chunkplan.planner.catalog.overheads import overheads
from chunkplan.planner.spec import GpuSpec
from chunkplan.service.settings import DeviceSetting


@dataclass(frozen=True)
class Device:
    """One device that attempts can run on."""

    name: str
    """``cpu``, ``cpu:N`` (a part of it) or ``cuda:N``, by the number that the driver's tool shows."""
    gpu: GpuSpec
    limit_bytes: int | None = None
    """Use at most this much of it."""
    max_jobs: int = 1
    """How many may run there at the same time, as far as their bounds fit together."""

    @property
    def kind(self) -> str:
        """``cpu``, ``cuda`` or ``rocm``."""
        return self.gpu.kind

    @property
    def names(self) -> frozenset[str]:
        """What a job may ask for to run here: the device, its kind, or what it is."""
        return frozenset({self.name, self.kind, self.gpu.name})

    @property
    def engine_name(self) -> str:
        """As the engine calls it: to it all parts of the processor are one."""
        return "cpu" if self.kind == "cpu" else self.name

    @property
    def memory_bytes(self) -> int:
        """What processes together can use of it."""
        usable = max(0, self.gpu.memory_bytes - overheads(self.gpu).driver_reserved_bytes)
        return usable if self.limit_bytes is None else min(usable, self.limit_bytes)


@dataclass(frozen=True)
class DeviceChoice:
    """Where a job may run, and what its plan is made for."""

    asked: str
    """What a device must be called: one of its `Device.names`."""
    devices: tuple[Device, ...]
    """Those of this host, the roomiest first; never empty."""
    given: GpuSpec | None
    """What the user wants the plan to be made for; None: the device that the job runs on."""

    @property
    def device(self) -> Device:
        """The roomiest one: what fits no other can wait for it."""
        return self.devices[0]

    @property
    def gpu(self) -> GpuSpec:
        """What the plan is made for."""
        return self.given or self.device.gpu


def choose(devices: Sequence[Device], asked: str | dict[str, Any] | None) -> DeviceChoice:
    """Which devices a job that asks for this may run on: by default any of the first one's kind.

    Raises:
        InputError: there is no such device here, or anywhere.
    """
    name = devices[0].kind if asked is None else asked
    if isinstance(name, str):
        called = [device for device in devices if name in {device.name, device.kind}]
        if called:
            return _choice(name, called, None)
        if name.partition(":")[0] in {"cpu", "cuda", "rocm"}:
            raise InputError("gpu", f"there is no device {name!r} here; there is: {_offered(devices)}")
    gpu = find_gpu(name) if isinstance(name, str) else _inline_gpu(name)
    if any(gpu.name == device.gpu.name for device in devices) and isinstance(name, str):
        return _choice(gpu.name, [device for device in devices if gpu.name == device.gpu.name], gpu)
    same_kind = [device for device in devices if device.kind == gpu.kind]
    if not same_kind:
        raise InputError(
            "gpu", f"no device of kind {gpu.kind} here to run {gpu.name!r} on; there is: {_offered(devices)}"
        )
    return _choice(gpu.kind, same_kind, gpu)


def local_devices(declared: Sequence[DeviceSetting] = (), max_jobs: int = 1) -> list[Device]:
    """The declared devices, or else every accelerator that the driver shows, and the processor. The first is
    default.

    Args:
        declared: by the operator.
        max_jobs: per device that is not declared, or says nothing else.

    Raises:
        InputError: a declared device is not here, or the parts of the processor are more than it has.
    """
    if not declared:
        found = [Device(f"cuda:{i}", gpu, max_jobs=max_jobs) for i, gpu in enumerate(detect_gpus())]
        return [*found, Device("cpu", find_gpu("cpu"), max_jobs=max_jobs)]
    devices = [_declared(setting, max_jobs) for setting in declared]
    parts = [device for device in devices if device.engine_name == "cpu"]
    if len(parts) > 1:
        if any(device.limit_bytes is None for device in parts):
            raise InputError("devices", "say with memory_bytes how much of the processor's memory each part may use")
        if sum(device.memory_bytes for device in parts) > parts[0].gpu.memory_bytes:
            raise InputError("devices", f"the parts of the processor exceed its {parts[0].gpu.memory_bytes} bytes")
    return devices


def _declared(setting: DeviceSetting, max_jobs: int) -> Device:
    kind, _, number = setting.name.partition(":")
    if setting.gpu is not None:
        gpu = find_gpu(setting.gpu)
        if (gpu.kind == "cpu") != (kind == "cpu") or gpu.kind == "mps":
            raise InputError("devices", f"{setting.name} cannot be a {setting.gpu}")
    elif kind == "cpu":
        gpu = find_gpu("cpu")
    else:
        found = detect_gpus()
        if int(number) >= len(found):
            raise InputError(
                "devices", f"the driver shows {len(found)} devices and no {setting.name}: say what it is with gpu"
            )
        gpu = found[int(number)]
    return Device(setting.name, gpu, setting.memory_bytes, setting.max_jobs or max_jobs)


def _choice(asked: str, devices: Sequence[Device], given: GpuSpec | None) -> DeviceChoice:
    return DeviceChoice(asked, tuple(sorted(devices, key=lambda device: -device.memory_bytes)), given)


def _inline_gpu(given: dict[str, Any]) -> GpuSpec:
    try:
        return parse(GpuSpec, given)
    except InputError as error:
        raise InputError(f"gpu.{error.field}", error.message) from error


def _offered(devices: Sequence[Device]) -> str:
    return ", ".join(
        device.name if device.kind == "cpu" else f"{device.name} ({device.gpu.name})" for device in devices
    )
