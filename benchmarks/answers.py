"""What people ask first: the fastest schedule that fits, or what stands in the way, in bytes.

Run: ``python -m benchmarks.answers [--json FILE]``. Every answer is an automatic plan, full-parameter ChunkFT
in bf16, AdamW, one sequence of 1024 tokens. Needs no GPU; the first run traces every model, which takes
minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from chunkplan.engine.spec import TrainingSpec
from chunkplan.planner import PlanRequest, plan
from chunkplan.planner.version import planner_version

QUESTIONS = (
    ("llama-3-8b", "rtx-4090"),
    ("llama-2-7b", "rtx-4060-ti-16gb"),
    ("llama-2-7b", "rtx-3060-12gb"),
    ("qwen2.5-32b", "h100-80gb"),
    ("qwen2.5-32b", "h200"),
    ("llama-3-70b", "h100-80gb"),
    ("llama-3-70b", "h200"),
)
GIB = 2**30


def answer(model: str, gpu: str, seq_len: int) -> dict[str, Any]:
    """The figures of one question."""
    training = TrainingSpec(seq_len=seq_len, schedule="auto")
    begin = time.process_time()
    found = plan(PlanRequest(model=model, gpu=gpu, training=training))
    obstacle = "" if found.fits else found.alternatives[0].why
    return {
        "model": model,
        "gpu": gpu,
        "seq_len": seq_len,
        "fits": found.fits,
        "schedule": found.schedule.model_dump(mode="json"),
        "peak": found.peak.model_dump(mode="json"),
        "capacity_bytes": found.capacity_bytes,
        "step_seconds": found.step_seconds,
        "tokens_per_second": found.tokens_per_second,
        "obstacle": obstacle,
        "others": [{"why": e.why, "upper_bytes": e.peak.upper_bytes, "step_seconds": e.step_seconds, "fits": e.fits}
                   for e in found.pareto[1:]],
        "planner_seconds": round(time.process_time() - begin, 2),
    }  # fmt: skip


def row(found: dict[str, Any]) -> str:
    """One line of the table in Markdown."""
    upper, capacity = found["peak"]["upper_bytes"] / GIB, found["capacity_bytes"] / GIB
    head = f"| {found['model']} | {found['gpu']} "
    if not found["fits"]:
        return f"{head}| no | {upper:.1f} of {capacity:.1f} GiB | | | {found['obstacle']} |"
    host = found["peak"]["host_bytes"] / GIB
    schedule = f"{found['schedule']['num_chunks']} chunks"
    time_taken = f"{found['step_seconds']:.2f} s | {found['tokens_per_second']:,.0f}"
    return f"{head}| {schedule} | {upper:.1f} of {capacity:.1f} GiB | {time_taken} | {host:.0f} GiB of host memory |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the answers there")
    parser.add_argument("--seq-len", type=int, default=1024)
    arguments = parser.parse_args()
    answers = []
    print("| model | device | fits | bound | per update | tokens/s | |\n|---|---|---|---|---|---|---|")
    for model, gpu in QUESTIONS:
        answers.append(answer(model, gpu, arguments.seq_len))
        print(row(answers[-1]), flush=True)
        if arguments.json is not None:
            content = {"planner_version": planner_version(), "answers": answers}
            arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
