"""The devices of a host, as the driver shows or the operator declares them, and which ones a job
may run on.
"""

import pytest
from pydantic import ValidationError

from chunkplan.engine.errors import InputError
from chunkplan.planner.catalog import find_gpu
from chunkplan.service.machines.devices import Device, choose, local_devices
from chunkplan.service.settings import DeviceSetting, Settings

GIB = 1 << 30
ADA, AMPERE = find_gpu("rtx-4090"), find_gpu("rtx-3090")


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A driver's tool that shows two devices."""
    tool = tmp_path / "nvidia-smi"
    rows = "0, GPU-a, NVIDIA GeForce RTX 4090, 24564, 8.9\\n1, GPU-b, NVIDIA L4, 23034, 8.9\\n"
    tool.write_text(f"#!/bin/sh\nprintf '{rows}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def declared(*devices, **settings):
    return local_devices([DeviceSetting(**device) for device in devices], **settings)


def test_every_accelerator_and_the_processor(driver):
    devices = local_devices(max_jobs=2)
    assert [(device.name, device.gpu.name, device.kind) for device in devices] == [
        ("cuda:0", "rtx-4090", "cuda"),
        ("cuda:1", "l4", "cuda"),
        ("cpu", "cpu", "cpu"),
    ]
    assert {device.max_jobs for device in devices} == {2}
    assert devices[0].memory_bytes < devices[0].gpu.memory_bytes, "the driver keeps some for itself"


def test_the_operator_says_which_devices_and_how_much_of_them(driver):
    (second,) = declared({"name": "cuda:1", "memory_bytes": 10 * GIB, "max_jobs": 3})
    assert (second.gpu.name, second.memory_bytes, second.max_jobs) == ("l4", 10 * GIB, 3)
    (whole,) = declared({"name": "cuda:1", "memory_bytes": 10**15}, max_jobs=2)
    assert whole.memory_bytes == Device("cuda:1", whole.gpu).memory_bytes
    assert whole.max_jobs == 2
    (slice_,) = declared({"name": "cuda:0", "gpu": "H100 80GB", "memory_bytes": 20 * GIB})
    assert (slice_.gpu.name, slice_.memory_bytes) == ("h100-80gb", 20 * GIB)


def test_parts_of_the_processor():
    parts = declared(*({"name": f"cpu:{i}", "memory_bytes": GIB} for i in range(2)))
    assert [(part.name, part.engine_name, part.memory_bytes) for part in parts] == [
        ("cpu:0", "cpu", GIB),
        ("cpu:1", "cpu", GIB),
    ]


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([{"name": "cuda:2"}], "shows 2 devices and no cuda:2"),
        ([{"name": "cuda:0", "gpu": "rtx-9999"}], "rtx-9999"),
        ([{"name": "cuda:0", "gpu": "cpu"}], "cannot be a cpu"),
        ([{"name": "cpu", "gpu": "l4"}], "cannot be a l4"),
        ([{"name": "cpu:0", "memory_bytes": GIB}, {"name": "cpu:1"}], "memory_bytes"),
        ([{"name": f"cpu:{i}", "memory_bytes": 2**50} for i in range(2)], "exceed"),
    ],
)
def test_what_is_not_here_cannot_be_declared(driver, devices, message):
    with pytest.raises(InputError, match=message):
        declared(*devices)


@pytest.mark.parametrize(
    "devices",
    [
        '[{"name": "gpu0"}]',
        '[{"name": "cuda:0"}, {"name": "cuda:0"}]',
        '[{"name": "cpu"}, {"name": "cpu:1"}]',
        '[{"name": "cpu", "memory_bytes": 0}]',
        '[{"name": "cpu", "memory": 1}]',
    ],
)
def test_malformed_declarations_are_refused(monkeypatch, devices):
    monkeypatch.setenv("CHUNKPLAN_DEVICES", devices)
    with pytest.raises(ValidationError, match="devices"):
        Settings()


HERE = [
    Device("cuda:0", AMPERE),
    Device("cuda:1", ADA),
    Device("cuda:2", ADA, limit_bytes=10 * GIB),
    Device("cpu", find_gpu("cpu")),
]


@pytest.mark.parametrize(
    ("asked", "name", "devices", "planned_for"),
    [
        (None, "cuda", ["cuda:0", "cuda:1", "cuda:2"], ADA),
        ("cuda", "cuda", ["cuda:0", "cuda:1", "cuda:2"], ADA),
        ("cuda:2", "cuda:2", ["cuda:2"], ADA),
        ("cpu", "cpu", ["cpu"], find_gpu("cpu")),
        ("NVIDIA GeForce RTX 4090", "rtx-4090", ["cuda:1", "cuda:2"], ADA),
        ("rtx-3060-12gb", "cuda", ["cuda:0", "cuda:1", "cuda:2"], find_gpu("rtx-3060-12gb")),
        ({"name": "mine", "memory_bytes": GIB, "kind": "cpu"}, "cpu", ["cpu"], None),
    ],
)
def test_jobs_ask_for_a_kind_a_device_or_a_gpu(asked, name, devices, planned_for):
    choice = choose(HERE, asked)
    assert choice.asked == name
    assert sorted(device.name for device in choice.devices) == devices
    assert all(choice.asked in device.names for device in choice.devices)
    assert choice.gpu == planned_for or choice.gpu.name == "mine"
    assert choice.device.memory_bytes == max(device.memory_bytes for device in choice.devices)


@pytest.mark.parametrize("asked", ["cuda:7", "rocm", "cpu:0", "apple-m2-max", "mi300x", "nonsense"])
def test_what_is_not_here_is_refused_by_name(asked):
    with pytest.raises(InputError) as refusal:
        choose(HERE, asked)
    assert refusal.value.field == "gpu"
