"""What the planner's tables state, measured on a GPU: context, workspaces, scratch of attention, rates."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from typing import Any

import torch

from benchmarks import gpu_attention
from chunkplan.planner.catalog.overheads import overheads
from chunkplan.planner.spec import GpuSpec
from chunkplan.planner.trace.kernels import attention_backward_scratch_bytes


def fresh(device: torch.device) -> None:
    """Give everything back and begin the peaks anew."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


_CONTEXT_PROGRAM = """
import json, sys, torch
device = torch.device(sys.argv[1])
free, total = torch.cuda.mem_get_info(device)
bare = total - free
a = torch.ones(1024, 1024, device=device, dtype=torch.bfloat16, requires_grad=True)
q = torch.ones(1, 4, 256, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
torch.nn.functional.silu(a @ a).softmax(-1).float().sum().backward()
torch.cuda.synchronize()
free, total = torch.cuda.mem_get_info(device)
print(json.dumps({"total_bytes": total, "bare_bytes": bare, "used_bytes": total - free,
                  "reserved_bytes": torch.cuda.memory_reserved(device)}))
"""


def context(device: torch.device, gpu: GpuSpec) -> dict[str, Any]:
    """Context and driver, from a process of its own; right where no other process uses the device."""
    done = subprocess.run(
        [sys.executable, "-c", _CONTEXT_PROGRAM, str(device)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    table = overheads(gpu)
    return {
        **found,
        "context_bytes": found["used_bytes"] - found["reserved_bytes"],
        "planned_context_bytes": table.context_bytes,
        "driver_reserved_bytes": _board_bytes() - found["total_bytes"],
        "planned_driver_reserved_bytes": table.driver_reserved_bytes,
    }


def _board_bytes() -> int:
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]) * 2**20


def workspace(device: torch.device, gpu: GpuSpec) -> dict[str, Any]:
    """What the first product takes from the allocator and keeps, forward and in autograd's thread."""
    fresh(device)
    a, out = (torch.ones(512, 512, device=device, dtype=torch.bfloat16) for _ in range(2))
    before = torch.cuda.memory_allocated(device)
    torch.mm(a, a, out=out)
    forward = torch.cuda.memory_allocated(device) - before
    leaf = a.clone().requires_grad_()
    (leaf @ a).sum().backward()
    del leaf
    both = torch.cuda.memory_allocated(device) - before
    return {"first_bytes": forward, "both_bytes": both, "planned_bytes": overheads(gpu).workspace_bytes}


def attention_scratch(device: torch.device, gpu: GpuSpec) -> dict[str, Any]:
    """Peak within flash attention's backward above its inputs and outputs, beside the formula."""
    batch, heads, groups, length, width = 2, 32, 8, 2048, 128
    sizes = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    q = torch.randn(batch, heads, length, width, **sizes)
    k, v = (torch.randn(batch, groups, length, width, **sizes) for _ in range(2))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        gradient = torch.ones_like(out)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        out.backward(gradient)
    torch.cuda.synchronize(device)
    gradients = sum(tensor.grad.nbytes for tensor in (q, k, v) if tensor.grad is not None)
    scratch = torch.cuda.max_memory_allocated(device) - before - gradients
    formula = attention_backward_scratch_bytes(batch, heads, groups, length, width, itemsize=2)
    return {"shape": [batch, heads, groups, length, width], "scratch_bytes": scratch, "planned_bytes": formula}


def host(device: torch.device, gpu: GpuSpec) -> dict[str, Any]:
    """Resident bytes of a process as it imports, opens the device, loads kernels and pins memory."""
    done = subprocess.run(
        [sys.executable, "-c", _HOST_PROGRAM, str(device)], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


_HOST_PROGRAM = """
import json, sys
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
found = {"bare": resident()}
import torch
found["torch"] = resident()
import transformers
from transformers import LlamaForCausalLM
found["transformers"] = resident()
device = torch.device(sys.argv[1])
torch.cuda.mem_get_info(device)
found["context"] = resident()
a = torch.ones(1024, 1024, device=device, dtype=torch.bfloat16, requires_grad=True)
torch.nn.functional.silu(a @ a).softmax(-1).float().sum().backward()
torch.cuda.synchronize()
found["products"] = resident()
q = torch.ones(1, 4, 256, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
torch.cuda.synchronize()
found["attention"] = resident()
kept, pinned = [], []
for size in (1000, 4097, 100_000, 3 * 2**20, 5 * 2**20 + 1, 33 * 2**20, 100 * 2**20, 300 * 2**20):
    before = resident()["VmRSS"]
    kept.append(torch.empty(size, dtype=torch.uint8, pin_memory=True))
    stats = torch.cuda.host_memory_stats() if hasattr(torch.cuda, "host_memory_stats") else {}
    pinned.append([size, resident()["VmRSS"] - before, {k: v for k, v in stats.items() if "current" in k}])
found["pinned"] = pinned
print(json.dumps(found))
"""


def measured_rates(device: torch.device, gpu: GpuSpec) -> dict[str, Any]:
    """Shares of the catalog's peak rates that large products and copies reach."""
    size = 8192
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    flops = 2 * size**3 / _seconds(lambda: a @ a, device)
    source = torch.empty(2**28, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)
    home = torch.empty(2**26, dtype=torch.float32, pin_memory=True)
    link = home.nbytes / _seconds(lambda: target[: home.numel()].copy_(home, non_blocking=True), device)
    return {
        "bf16_flops": flops, "bf16_share": flops / gpu.bf16_flops, "bandwidth": moved,
        "bandwidth_share": moved / gpu.memory_bandwidth, "link_bandwidth": link,
        "planned_link_bandwidth": gpu.link_bandwidth, "launches": _launch_seconds(device),
    }  # fmt: skip


def _launch_seconds(device: torch.device) -> dict[str, float]:
    """Seconds of one small operation: forward alone, and forward and backward of a chain of them."""
    x = torch.ones(64, device=device)
    leaf = torch.ones(64, device=device, requires_grad=True)

    def chain(start: torch.Tensor) -> torch.Tensor:
        for _ in range(200):
            start = start * 1.0
        return start

    return {
        "forward": _seconds(lambda: chain(x), device) / 200,
        "forward_and_backward": _seconds(lambda: chain(leaf).sum().backward(), device) / 400,
    }


def _seconds(work: Any, device: torch.device, repeats: int = 20) -> float:
    for _ in range(3):
        work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3 / repeats


CONSTANTS = {
    "context": context,
    "workspace": workspace,
    "attention_scratch": attention_scratch,
    "attention_choices": gpu_attention.choices,
    "attention_memory": gpu_attention.scratch,
    "host": host,
    "rates": measured_rates,
}
