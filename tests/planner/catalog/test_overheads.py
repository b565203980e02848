"""What the planner adds to a trace: by device, with its source, and overridable."""

import subprocess
import sys

import pytest

from chunkplan.planner.catalog import find_gpu, gpus
from chunkplan.planner.catalog.overheads import overheads

MIB = 1024**2


@pytest.mark.parametrize(
    ("gpu", "workspace_bytes"),
    [
        ("rtx-3090", 8 * MIB + 128 * 1024),
        ("rtx-4090", 8 * MIB + 128 * 1024),
        ("a100-80gb", 8 * MIB + 128 * 1024),
        ("h100-80gb", 32 * MIB),
        ("h200", 32 * MIB),
        ("rtx-5090", 32 * MIB),
    ],
)
def test_cublas_workspaces_follow_the_architecture(gpu, workspace_bytes):
    found = overheads(find_gpu(gpu))
    assert found.workspace_bytes == workspace_bytes
    assert found.num_workspaces == 2


def test_the_context_depends_on_the_cuda_version():
    gpu = find_gpu("rtx-3090")
    assert overheads(gpu.model_copy(update={"cuda_version": "12.8"})).context_bytes == 256 * MIB
    assert overheads(gpu.model_copy(update={"cuda_version": "13.0"})).context_bytes > 256 * MIB
    assert overheads(gpu) == overheads(gpu.model_copy(update={"cuda_version": "13.0"}))
    assert overheads(find_gpu("rtx-4090")).context_bytes == 426 * MIB


@pytest.mark.parametrize("name", ["context_bytes", "workspace_bytes", "driver_reserved_bytes", "runtime_bytes"])
@pytest.mark.parametrize("gpu", ["rtx-4090", "cpu"])
def test_what_is_given_with_the_gpu_wins(gpu, name):
    table = overheads(find_gpu(gpu))
    found = overheads(find_gpu(gpu).model_copy(update={name: 123_456_789}))
    assert getattr(found, name) == 123_456_789 != getattr(table, name)
    assert [field for field, source in found.sources.items() if source == "given with the GPU"] == [name]
    assert all(getattr(found, other) == getattr(table, other) for other in table.sources if other != name)


def test_what_the_driver_keeps_matches_the_capacity_that_torch_reports():
    """Public OOM messages: an RTX 4090 has 23.64 GiB, an H200 139.80 GiB, an RTX 5090 31.36 GiB."""
    for name, gib in (("rtx-4090", 23.64), ("h200", 139.80), ("rtx-5090", 31.36), ("a100-80gb", 79.14)):
        gpu = find_gpu(name)
        usable = gpu.memory_bytes - overheads(gpu).driver_reserved_bytes
        assert usable == pytest.approx(gib * 2**30, abs=0.006 * 2**30)


def test_every_catalog_gpu_has_own_rows_with_sources():
    for gpu in gpus():
        found = overheads(gpu)
        assert 200 * MIB <= found.context_bytes <= 1024 * MIB
        for field in ("context_bytes", "workspace_bytes", "runtime_bytes", "driver_reserved_bytes"):
            assert found.sources[field]
            assert "largest" not in found.sources[field] or gpu.kind != "cuda"


def test_an_unknown_gpu_gets_cautious_values():
    unknown = find_gpu("rtx-4090").model_copy(update={"compute_capability": None})
    found = overheads(unknown)
    assert found.context_bytes == 640 * MIB
    assert found.workspace_bytes == 32 * MIB
    assert "largest" in found.sources["context_bytes"]


def test_the_cpu_has_a_process_and_nothing_else():
    found = overheads(find_gpu("cpu"))
    assert (found.context_bytes, found.workspace_bytes, found.driver_reserved_bytes) == (0, 0, 0)
    assert 200 * MIB < found.runtime_bytes < 700 * MIB


def test_the_runtime_base_is_what_a_process_takes_here():
    program = (
        "import torch, transformers\n"
        "transformers.LlamaForCausalLM\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmRSS')))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    measured_bytes = int(answer.split()[1]) * 1024
    assert 0.6 < overheads(find_gpu("cpu")).runtime_bytes / measured_bytes < 1.6
