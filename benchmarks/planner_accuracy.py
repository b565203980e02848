"""Real training runs on the CPU against their plans: python -m benchmarks.planner_accuracy [--output FILE].

Every case trains a randomly initialised model through the engine for one cycle, reads the allocator's own
record (torch.profiler memory events) of every chunk and phase, and compares it with the plan of the same
request. What a job's process takes as a whole is benchmarks/trainer_process.py.

What is in the output file is not run again, unless planner, engine, this file or the cases have changed: it
can be stopped at any time, and ``--minutes`` ends it between two cases.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import platform
import sys
import time
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: kineto prints a line per profiled step

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from benchmarks import accuracy_cases
from benchmarks.accuracy_cases import CONFIGS, Case, grid
from benchmarks.peers import PEERS, peers_say
from chunkplan.engine import ChunkFT
from chunkplan.engine.model.adapters import add_adapters
from chunkplan.engine.model.loading import DTYPES, attention_for
from chunkplan.engine.model.tasks import Task, task_of, task_of_config
from chunkplan.engine.record.profiler import CpuProfiler
from chunkplan.engine.spec import TrainingSpec
from chunkplan.planner import Plan, PlanRequest, plan
from chunkplan.planner.calibration.residuals import STEP, Residual, residuals
from chunkplan.planner.version import code_digest, planner_version

RESULTS = Path(__file__).parent / "results" / "planner_accuracy.json"


@dataclass(frozen=True)
class Measured:
    """Peak of one phase of one update."""

    chunk_index: int
    phase: str
    allocated_bytes: int


def build(config: dict[str, Any], training: TrainingSpec) -> PreTrainedModel:
    """The model with random weights, ready to train."""
    parsed = AutoConfig.for_model(**config)
    parsed.use_cache = False
    model = task_of_config(parsed).auto_class.from_config(
        parsed, dtype=DTYPES[training.precision], attn_implementation=attention_for(parsed, training.attention)
    )
    return model.train()


def measure(config: dict[str, Any], training: TrainingSpec, num_cycles: int = 1) -> list[Measured]:
    """Train for whole cycles and return what the allocator recorded, net of what lived before."""
    profiler = CpuProfiler()
    gc.collect()
    with profiler.step(), profiler.phase("load"):
        probe = torch.empty(64)
    before = profiler.samples[0].allocated_bytes - probe.nbytes
    with profiler.step():
        del probe
    samples = _train(config, training, num_cycles, profiler)
    with profiler.step():
        gc.collect()
    return [Measured(s.chunk_index, s.phase, s.allocated_bytes - before) for s in samples]


def _train(config: dict[str, Any], training: TrainingSpec, num_cycles: int, profiler: CpuProfiler) -> list[Measured]:
    with profiler.step(), profiler.phase("load"):
        model = build(config, training)
        if training.lora is not None:
            add_adapters(model, training.lora)
        tuner = ChunkFT.of(training, model, observer=profiler)
    task = task_of(model)
    generator, shape = torch.Generator().manual_seed(0), (training.micro_batch_size, training.seq_len)
    num_tokens = training.gradient_accumulation_steps * training.micro_batch_size * training.seq_len
    samples = []
    for _ in range(num_cycles * tuner.schedule.updates_per_cycle):
        chunk_index = tuner.visit.chunk_index
        with profiler.step():
            with profiler.phase("load"):
                batches = []
                for _ in range(training.gradient_accumulation_steps):
                    ids = torch.randint(0, config["vocab_size"], shape, generator=generator)
                    batches.append({"input_ids": ids, "labels": ids.clone()})
                    if task is Task.SEQ2SEQ:
                        batches[-1]["decoder_input_ids"] = ids.clone()
                    if task is not Task.CAUSAL:
                        batches[-1]["attention_mask"] = torch.ones_like(ids)
                        batches[-1]["attention_mask"][-1, -1] = 0
                    if training.packing:
                        batches[-1]["position_ids"] = _positions(shape, generator)
                del ids
            for i, batch in enumerate(batches, start=1):
                tuner.backward(batch, float(num_tokens), is_last=i == len(batches))
            tuner.step()
            del batches, batch
        samples += [Measured(chunk_index, s.phase, s.allocated_bytes) for s in profiler.samples]
    tuner.close()
    return samples


def _positions(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Positions of two rows in each sequence, cut at random."""
    positions = torch.arange(shape[1]).repeat(shape[0], 1)
    for sequence in positions:
        cut = int(torch.randint(1, shape[1], (), generator=generator))
        sequence[cut:] -= cut
    return positions


def planned(item: Case) -> Plan:
    """The case's plan."""
    request = {"model": {"config": CONFIGS[item.model]}, "gpu": "cpu", "training": item.training}
    return plan(PlanRequest.model_validate(request))


def compare(item: Case) -> list[Residual]:
    """Plan and run one case; residuals per chunk and phase."""
    torch.manual_seed(0)
    return residuals(planned(item), measure(CONFIGS[item.model], item.training))


def summary(found: list[Residual]) -> dict[str, Any]:
    """Error figures over residuals."""
    errors = [item.relative_error for item in found]
    return {
        "count": len(errors),
        "mean_absolute": sum(map(abs, errors)) / len(errors),
        "mean_signed": sum(errors) / len(errors),
        "max_over": max(errors),
        "max_under": min(errors),
        "max_under_bytes": min(item.predicted_bytes - item.measured_bytes for item in found),
        "under_by_more_than_0.1_percent": sum(error < -0.001 for error in errors),
        "under_by_more_than_1_percent": sum(error < -0.01 for error in errors),
    }


def versions() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "planner": planner_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def code_version() -> str:
    """Digest of what the figures depend on: traced code, and this benchmark's."""
    digest = hashlib.sha256(code_digest().encode())
    for file in (__file__, accuracy_cases.__file__):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:16]


def run(item: Case) -> dict[str, Any]:
    """One row: errors of allocated bytes over chunks and phases, and what peers say of the peak."""
    found = compare(item)
    chunks = [residual for residual in found if residual.phase == STEP]
    answer = planned(item)
    return {
        "name": item.name,
        "training": item.training.model_dump(mode="json"),
        "peak_bytes": max(residual.measured_bytes for residual in chunks),
        **summary(chunks),
        "steps": [residual.model_dump() for residual in chunks],
        "phases": [residual.model_dump() for residual in found if residual.phase != STEP],
        "peers": peers_say(CONFIGS[item.model], answer.model.num_parameters, item.training),
    }


def peer_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Every peer's error over the cases that it can do, beside ours over the same cases."""
    found = {}
    for name in PEERS:
        able = [row for row in rows if isinstance(row["peers"][name], int)]
        errors = [row["peers"][name] / row["peak_bytes"] - 1 for row in able]
        ours = [row["mean_absolute"] for row in able]
        found[name] = {
            "num_cases": len(able),
            "mean_absolute": sum(map(abs, errors)) / len(errors) if errors else None,
            "max_absolute": max(map(abs, errors), default=None),
            "ours_mean_absolute": sum(ours) / len(ours) if ours else None,
        }
    return found


def result_of(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The output file."""
    steps = [Residual(**values) for row in rows for values in row["steps"]]
    phases = [Residual(**values) for row in rows for values in row["phases"]]
    return {
        "command": " ".join(["python -m benchmarks.planner_accuracy", *sys.argv[1:]]),
        "versions": versions(),
        "code": code_version(),
        "seconds": round(seconds, 1),
        "num_runs": len(rows),
        "per_chunk": summary(steps),
        "per_phase": summary(phases),
        "peers": peer_summary(rows),
        "configs": CONFIGS,
        "runs": rows,
    }


def main() -> None:
    """Run what is missing of the grid, print the table, write the results."""
    parser = ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=60.0, help="no case begins later than this")
    parser.add_argument("--cases", type=int, help="only every n-th case, so that this many are run")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    until = begin + 60 * arguments.minutes
    rows, seconds = known_rows(arguments.output)
    items = list(grid())
    if arguments.cases:
        items = items[:: max(1, len(items) // arguments.cases)]

    def save() -> None:
        order = {item.name: number for number, item in enumerate(grid())}
        kept = sorted(rows.values(), key=lambda row: order[row["name"]])
        result = result_of(kept, seconds + time.perf_counter() - begin)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        partial = arguments.output.with_suffix(".partial")
        runs = ",\n".join(json.dumps(row) for row in result.pop("runs"))
        partial.write_text(f'{json.dumps(result, indent=1)[:-2]},\n "runs": [\n{runs}\n]}}\n')
        partial.replace(arguments.output)

    print(f"{'case':88} {'peak MB':>8} {'mean |e|':>9} {'worst':>9}")
    for item in items:
        if item.name not in rows and time.perf_counter() < until:
            row = rows[item.name] = run(item)
            worst = row["max_over"] if row["max_over"] > -row["max_under"] else row["max_under"]
            print(
                f"{item.name:88} {row['peak_bytes'] / 1e6:8.2f} {row['mean_absolute']:9.4%} {worst:+9.4%}", flush=True
            )
            save()
    ordered = list(rows.values())
    if not ordered:
        return
    save()
    result = json.loads(arguments.output.read_text())
    for title in ("per_chunk", "per_phase", "peers"):
        print(title, json.dumps(result[title]))
    print(f"{len(ordered)} runs in {result['seconds']} s")


def known_rows(path: Path) -> tuple[dict[str, dict[str, Any]], float]:
    """Rows of the same code by name, and the seconds that they took."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}, 0.0
    if content.get("code") != code_version():
        return {}, 0.0
    names = {item.name for item in grid()}
    return {row["name"]: row for row in content["runs"] if row["name"] in names}, content["seconds"]


if __name__ == "__main__":
    main()
