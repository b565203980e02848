"""A real GPU against its plans: python -m benchmarks.gpu_truth [--device cuda:0] [--minutes 9] [--output
FILE].

Measures what the planner's tables state (context, what the driver keeps, cuBLAS workspaces, flash attention's
scratch, rates of products and copies), then trains random models of a grid through the engine for one cycle
and compares allocated, reserved and device memory and the time of an update with the plan; then replays a
recorded memory history through the allocator's simulator; then trains under a hard limit at the planned
bound, which must never fail.

It can be stopped at any time: what is in the output file is not measured again unless the planner's code has
changed, and ``--minutes`` ends it between two cases. Needs torch, transformers and pydantic, neither a
service nor a database. Where a GPU machine lacks pydantic, carry it: ``pip install --target wheels pydantic``
on a machine with the same Python, and ``PYTHONPATH=wheels`` there. ``--device cpu`` runs the grid's first
cases on the processor, to its end, and says what it could not check. ``--fit FILE`` writes the runs as a
calibration (chunkplan.planner.calibration.margins).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import traceback
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import MODELS, TINY, Case, grid, headline
from benchmarks.gpu_constants import CONSTANTS, fresh
from benchmarks.gpu_histories import keep_history, simulate
from benchmarks.planner_accuracy import build, measure, summary, versions
from chunkplan.engine import ChunkFT
from chunkplan.engine.errors import InputError
from chunkplan.engine.model.adapters import add_adapters
from chunkplan.engine.record.profiler import CudaProfiler, process_peak_bytes
from chunkplan.planner import Plan, PlanRequest, plan
from chunkplan.planner.calibration.margins import Calibration, Observation, device_key, write_calibration
from chunkplan.planner.calibration.residuals import STEP, residuals
from chunkplan.planner.catalog import detect_gpu, find_gpu
from chunkplan.planner.catalog.overheads import overheads
from chunkplan.planner.spec import GpuSpec
from chunkplan.planner.version import code_digest

RESULTS = Path(__file__).parent / "results" / "gpu_truth.json"
ONLY_ON_A_GPU = (
    "context and what the driver keeps", "cuBLAS workspaces", "flash attention's scratch",
    "rates of matrix products and copies", "reserved and device memory", "time of an update by CUDA events",
    "replay of a recorded memory history", "a hard limit at the planned bound",
)  # fmt: skip


@dataclass
class Record:
    """The output file: what was measured so far."""

    path: Path
    content: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, device: dict[str, Any]) -> Record:
        """Continue a file of the same device and code, or begin one."""
        head = {"device": device, "versions": versions(), "code": code_digest()}
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            content = {}
        if {key: content.get(key) for key in head} != head:
            content = {**head, "constants": {}, "runs": {}, "replays": {}, "dense": {}, "limits": {}}
        return cls(path, content)

    def put(self, section: str, name: str, value: Any) -> None:
        """Keep one result, on disk too."""
        self.content[section][name] = value
        self.save()

    def save(self) -> None:
        """Write the file in one piece."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)


def planned(case: Case, gpu: GpuSpec | str) -> Plan:
    """The plan of a case."""
    request = {"model": {"config": case.config}, "gpu": gpu, "training": case.training}
    return plan(PlanRequest.model_validate(request))


def compared(case: Case, answer: Plan, samples: list[Any]) -> dict[str, Any]:
    """Residuals of a run as the record keeps them."""
    steps = [residual for residual in residuals(answer, samples) if residual.phase == STEP]
    return {
        "peak_bytes": max(residual.measured_bytes for residual in steps),
        "planned": answer.peak.model_dump(),
        "weights_bytes": answer.model.parameter_bytes,
        "plan_id": answer.id,
        "allocated": summary(steps),
        "chunks": [residual.model_dump() for residual in steps],
        "training": case.training.model_dump(mode="json"),
    }


def run_on_cpu(case: Case) -> dict[str, Any]:
    """One cycle on the processor: allocated bytes only."""
    torch.manual_seed(0)
    return compared(case, planned(case, "cpu"), measure(case.config, case.training))


@dataclass(frozen=True)
class Seen:
    """Allocated peak of one phase of one update on the GPU."""

    chunk_index: int
    phase: str
    allocated_bytes: int


class Plans:
    """Plans of cases, made ahead in other processes: a device that is borrowed does not wait for them."""

    def __init__(self, cases: list[Case], gpu: GpuSpec) -> None:
        workers = max(1, min(8, (os.cpu_count() or 2) - 2))
        self._pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        self._answers = {case.name: self._pool.submit(planned, case, gpu) for case in cases}

    def of(self, case: Case) -> Plan:
        """The plan of one of the cases."""
        return self._answers[case.name].result()

    def close(self) -> None:
        """Drop what was not asked for."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class GpuRun:
    """One model on the GPU, trained for cycles."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.seconds: list[float] = []
        self.phase_seconds: Counter[str] = Counter()

    def cycles(self, count: int = 2) -> list[Seen]:
        """Build the model and train it for cycles; returns the peaks by phase.

        Times are those of the last cycle: in the first one kernels are loaded and host memory is pinned.
        """
        training, device = self.case.training, self.device
        profiler = CudaProfiler(device)
        torch.manual_seed(0)
        with device:
            model = build(self.case.config, training)
            if training.lora is not None:
                add_adapters(model, training.lora)
        tuner = ChunkFT.of(training, model, observer=profiler)
        shape = (training.micro_batch_size, training.seq_len)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        seen: list[Seen] = []
        num_updates = tuner.schedule.updates_per_cycle
        for update in range(count * num_updates):
            chunk_index = tuner.visit.chunk_index
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with profiler.step():
                ids = torch.randint(0, vocabulary, shape, device=device)
                batch = {"input_ids": ids, "labels": ids.clone()}
                begin.record()
                tuner.backward(batch, float(ids.numel()))
                tuner.step()
                end.record()
                del ids, batch
            torch.cuda.synchronize(device)
            if update >= (count - 1) * num_updates:
                self.seconds.append(begin.elapsed_time(end) / 1e3)
            seen += [Seen(chunk_index, s.phase, s.allocated_bytes) for s in profiler.samples]
            for sample in profiler.samples if update >= (count - 1) * num_updates else []:
                self.phase_seconds[sample.phase] += sample.seconds / num_updates
        tuner.close()
        return seen


def run_on_gpu(case: Case, answer: Plan, device: torch.device) -> dict[str, Any]:
    """Two cycles on the GPU against their plan: allocated, reserved, what the driver says, and time."""
    if not answer.fits:
        return {"skipped": "the plan does not fit", "planned": answer.peak.model_dump()}
    fresh(device)
    before_bytes = torch.cuda.memory_allocated(device)
    run = GpuRun(case, device)
    reserved_by_phase = _HighestReserved(device)
    with reserved_by_phase:
        samples = run.cycles()
    free, total = torch.cuda.mem_get_info(device)
    seconds = sum(run.seconds) / len(run.seconds)
    return {
        **compared(case, answer, samples),
        "allocated_before_bytes": before_bytes,
        "phase_seconds": dict(run.phase_seconds),
        "host_resident_bytes": process_peak_bytes(),
        "pinned_bytes": torch.cuda.host_memory_stats().get("allocated_bytes.peak"),
        "reserved_bytes": reserved_by_phase.highest_bytes,
        "reserved_error": answer.peak.reserved_bytes / reserved_by_phase.highest_bytes - 1,
        "used_at_end_bytes": total - free,
        "upper_holds": answer.peak.upper_bytes
        >= reserved_by_phase.highest_bytes + answer.peak.device_bytes - answer.peak.reserved_bytes,
        "step_seconds": seconds,
        "planned_step_seconds": answer.step_seconds,
        "time_ratio": seconds / answer.step_seconds * answer.time_ratio,
    }


class _HighestReserved:
    """The highest reserved bytes of a block of code, whatever the profiler resets within: nothing is given
    back.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.highest_bytes = 0

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        # Segments stay until the cache is emptied, which only the next case does.
        self.highest_bytes = torch.cuda.memory_reserved(self._device)


def replay(case: Case, device: torch.device, histories: Path) -> dict[str, Any]:
    """Record a run's memory history and feed it to the simulator: the peaks of reserved bytes must agree."""
    fresh(device)
    before = torch.cuda.memory_reserved(device)
    torch.cuda.memory._record_memory_history(max_entries=2_000_000, stacks="python", context=None)
    try:
        GpuRun(case, device).cycles(1)
        events = torch.cuda.memory._snapshot()["device_traces"][device.index or 0]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    simulated, recorded, num_unknown = simulate(events)
    keep_history(events, histories / f"history_{case.model}_{case.training.schedule.num_chunks}.npz")
    return {
        "num_events": len(events),
        "reserved_before_bytes": before,
        "recorded_reserved_bytes": recorded,
        "simulated_reserved_bytes": simulated,
        "frees_of_earlier_blocks": num_unknown,
        "relative_error": simulated / recorded - 1 if recorded else 0.0,
    }


def dense(case: Case, device: torch.device) -> dict[str, Any]:
    """The same model and batch trained densely by torch's own AdamW, with transformers' checkpointing."""
    fresh(device)
    training = case.training
    with device:
        model = build(case.config, training)
    if training.activation_checkpointing == "full":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(0, 1000, (training.micro_batch_size, training.seq_len), device=device)
    seconds = []
    for _ in range(4):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        end.record()
        torch.cuda.synchronize(device)
        seconds.append(begin.elapsed_time(end) / 1e3)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.memory_reserved(device),
        "step_seconds": min(seconds),
    }


def under_limit(case: Case, answer: Plan, gpu: GpuSpec, device: torch.device) -> dict[str, Any]:
    """Train with the allocator held to the planned bound less the context."""
    limit = answer.peak.upper_bytes - overheads(gpu).context_bytes
    total = torch.cuda.get_device_properties(device).total_memory
    if limit >= total:
        return {"skipped": "the bound is above the device"}
    fresh(device)
    with _fraction(limit / total, device):
        try:
            GpuRun(case, device).cycles(1)
        except torch.OutOfMemoryError as error:
            return {"limit_bytes": limit, "out_of_memory": str(error).splitlines()[0]}
    return {"limit_bytes": limit, "out_of_memory": None}


@contextmanager
def _fraction(share: float, device: torch.device) -> Iterator[None]:
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def on_gpu(record: Record, device: torch.device, gpu: GpuSpec, until: float, num_cases: int | None) -> None:
    """Everything that is not in the record yet, until the time is over."""
    for name, find in CONSTANTS.items():
        if name not in record.content["constants"]:
            found = _attempt(lambda find=find: find(device, gpu))
            record.put("constants", name, found)
            print(name, json.dumps(found)[:1500], flush=True)
            fresh(device)
    cases = [*headline(), *grid(MODELS)][:num_cases]
    plans = Plans(cases, gpu)
    try:
        for number, case in enumerate(cases):
            work = {"runs": lambda case=case: run_on_gpu(case, plans.of(case), device)}
            if number in _REPLAYED:  # a run of their own
                work["replays"] = lambda case=case: replay(case, device, record.path.parent)
            if number in _BESIDE_DENSE:
                work["dense"] = lambda case=case: dense(case, device)
            work["limits"] = lambda case=case: under_limit(case, plans.of(case), gpu, device)
            for section, measure_it in work.items():
                if time.monotonic() > until:
                    return
                if case.name not in record.content[section]:
                    record.put(section, case.name, _attempt(measure_it))
                    found = record.content[section][case.name]
                    print(section, case.name, {key: found[key] for key in found if key not in _LONG}, flush=True)
    finally:
        plans.close()


def _attempt(measure_it: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What one measurement found, or why it failed: the next one is made in either case."""
    try:
        return measure_it()
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}
    except (InputError, RuntimeError, ValueError, AssertionError, TypeError) as error:
        traceback.print_exc(limit=-3)
        return {"failed": f"{type(error).__name__}: {error}"[:500]}


_REPLAYED, _BESIDE_DENSE = (0, 1, 2), (0, 5)
_LONG = {"chunks", "planned", "training", "allocated"}


def on_cpu(record: Record, until: float, num_cases: int | None) -> None:
    """The first cases on the processor, with tiny models."""
    for case in [case for case in grid(TINY) if case.training.seq_len * case.training.micro_batch_size <= 2048][
        :num_cases
    ]:
        if time.monotonic() > until:
            return
        if case.name not in record.content["runs"]:
            record.put("runs", case.name, run_on_cpu(case))
            errors = record.content["runs"][case.name]["allocated"]
            print(
                f"{case.name:72} mean {errors['mean_absolute']:.3%} worst under {errors['max_under']:+.3%}", flush=True
            )


def table(record: Record) -> dict[str, Any]:
    """Errors over all runs, and everything that went against a plan."""
    runs = [run for run in record.content["runs"].values() if "chunks" in run]
    reserved = [run["reserved_error"] for run in runs if "reserved_error" in run]
    ratios = [run["time_ratio"] for run in runs if "time_ratio" in run]
    errors = [chunk["relative_error"] for run in runs for chunk in run["chunks"]]
    limits, replays = record.content["limits"], record.content["replays"].values()
    return {
        "num_runs": len(runs),
        "allocated_mean_absolute": sum(map(abs, errors)) / len(errors) if errors else None,
        "allocated_max_absolute": max(map(abs, errors), default=None),
        "allocated_max_under": min(errors, default=None),
        "reserved_mean_absolute": sum(map(abs, reserved)) / len(reserved) if reserved else None,
        "reserved_max_absolute": max(map(abs, reserved), default=None),
        "time_ratio_median": sorted(ratios)[len(ratios) // 2] if ratios else None,
        "bounds_exceeded": [name for name, run in record.content["runs"].items() if run.get("upper_holds") is False],
        "num_limited_runs": sum("limit_bytes" in found for found in limits.values()),
        "out_of_memory_at_bound": [name for name, found in limits.items() if found.get("out_of_memory")],
        "replay_max_error": max((abs(found.get("relative_error", 1.0)) for found in replays), default=None),
    }


def observations(record: Record) -> list[Observation]:
    """The GPU runs as the planner's calibration wants them."""
    return [
        Observation(
            plan_id=run["plan_id"],
            predicted_bytes=run["planned"]["device_bytes"],
            weights_bytes=run["weights_bytes"],
            measured_bytes=run["reserved_bytes"] + run["planned"]["device_bytes"] - run["planned"]["reserved_bytes"],
            time_ratio=run["time_ratio"],
        )
        for run in record.content["runs"].values()
        if "reserved_bytes" in run
    ]


def main() -> int:
    """Measure what is missing, print the table; 1 when a run went out of memory at its bound."""
    parser = ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpu", help="catalog id of the device; by default the driver is asked")
    parser.add_argument("--minutes", type=float, default=9.0, help="no case begins later than this")
    parser.add_argument("--cases", type=int, help="at most this many of the grid's cases")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--fit", type=Path, help="write a calibration file of the runs")
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.minutes
    device = torch.device(arguments.device)
    is_gpu = device.type == "cuda"
    gpu = find_gpu("cpu") if not is_gpu else find_gpu(arguments.gpu) if arguments.gpu else detect_gpu()
    name = torch.cuda.get_device_name(device) if is_gpu else "cpu"
    record = Record.open(arguments.output, {"name": name, "planned_as": gpu.model_dump(mode="json")})
    if is_gpu:
        on_gpu(record, device, gpu, until, arguments.cases)
    else:
        on_cpu(record, until, arguments.cases)
    record.content["table"] = table(record)
    record.content["not_checked"] = [] if is_gpu else list(ONLY_ON_A_GPU)
    record.save()
    print(json.dumps(record.content["table"], indent=1))
    if not is_gpu:
        print("no GPU: not checked: " + "; ".join(ONLY_ON_A_GPU))
    if arguments.fit and is_gpu:
        write_calibration(Calibration(devices={device_key(gpu): observations(record)}), arguments.fit)
    return 1 if record.content["table"]["out_of_memory_at_bound"] else 0


if __name__ == "__main__":
    sys.exit(main())
