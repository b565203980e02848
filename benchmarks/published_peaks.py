"""Peaks measured on GPUs by others, beside ours: python -m benchmarks.published_peaks [--csv FILE] [--output FILE].

A row can be planned when chunkplan has its method and optimizer, and its model, batch and length are stated. What a row
leaves open is assumed and named; what chunkplan does otherwise than the row's trainer is named too. Rows of which
nothing had to be assumed are complete. Beside ours stand the peers' estimates (benchmarks/peers.py).
"""

from __future__ import annotations

import csv
import json
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS, peers_say
from planner import PLANNER_VERSION, Plan, PlanRequest, plan
from planner.catalog import find_model

HERE = Path(__file__).parent
GIB = 2**30
UNIT_BYTES = {"GiB": GIB, "GB": 10**9, "B": 1, "GB as printed; GiB by arithmetic": GIB}
GPUS = {"a100": "a100-80gb", "unknown": "a100-80gb"}
MODELS = {"llama-7b": "llama-2-7b"}
"""Same shapes under another name."""
BLOCKS = "block, switch every 50"
EAGER = ("LOMO paper",)
"""Sources from before transformers had fused attention for Llama (4.36): their runs built the attention matrix."""
FLOOR_GIB = 12.55
"""Weights of Llama-2-7B in bf16: no schedule with resident weights goes below."""


def reason_against(row: dict[str, str]) -> str:
    """Why a row cannot be planned; empty when it can."""
    if row["method"] not in ("chunkft", "full", BLOCKS):
        return f"method {row['method']!r}"
    if row["optimizer"] not in ("adamw", "adam", "adafactor"):
        return f"optimizer {row['optimizer']!r}" + (" with activation offload" if "offload" in row["notes"] else "")
    if "unknown" in (row["micro_batch"], row["seq_len"]):
        return "batch or length not stated"
    if not row["gpus"].isdigit() or int(row["gpus"]) != 1:
        return "several GPUs"
    if "tiny random" in row["model"]:
        return "tiny random model: the allocator's unit test covers it"
    return ""


def request_of(row: dict[str, str]) -> tuple[PlanRequest, list[str]]:
    """The plan request of a row, and what had to be assumed."""
    assumed = []
    checkpointing = {"yes": "full", "no": "none"}.get(row["activation_checkpointing"])
    if checkpointing is None:
        checkpointing = "full"
        assumed.append("full checkpointing assumed")
    # The rows' trainers keep the states on the device, as chunkplan does within a visit of several updates.
    schedule: dict[str, Any] = {"num_chunks": 1, "switch_every": 3}
    if row["method"] == "chunkft":
        schedule = {"num_chunks": 32}
        assumed.append("32 chunks assumed")
    elif row["method"] == BLOCKS:
        schedule = {"num_chunks": 36, "switch_every": 50, "states": "reset", "master": "fp32"}
        assumed.append("36 chunks stand for its 36 layers; embeddings are trained too")
    elif row["weights_dtype"] == "mixed":
        schedule["master"] = "fp32"
    elif row["optimizer"] != "adafactor":
        schedule["state_dtype"] = "bf16"  # torch's AdamW gives its moments the weights' type
    if row["source"].startswith(EAGER):
        assumed.append("today's eager attention; the row's code kept more of the attention matrix")
    fused = row["method"] == "chunkft" or "chunked cross-entropy" in row["notes"] or row["id"] == "P07"
    if "compile" in row["notes"] or row["id"] == "P07":
        assumed.append("compiled in the row, eager here")
    training = {
        "method": "chunkft" if row["method"] == BLOCKS else row["method"],
        "seq_len": int(row["seq_len"]), "micro_batch_size": int(row["micro_batch"]),
        "attention": "eager" if row["source"].startswith(EAGER) else "sdpa",
        "optimizer": "adafactor" if row["optimizer"] == "adafactor" else "adamw",
        "activation_checkpointing": checkpointing, "loss": "fused" if fused else "standard", "schedule": schedule,
        "precision": "fp16" if row["weights_dtype"] == "mixed" else "bf16",
    }  # fmt: skip
    gpu = GPUS.get(row["gpu"], row["gpu"])
    model = MODELS.get(row["model"], row["model"])
    return PlanRequest.model_validate({"model": model, "gpu": gpu, "training": training}), assumed


def our_bytes(answer: Plan, counter: str) -> int:
    """The counter of the plan that the row's figure is."""
    return answer.peak.reserved_bytes if counter == "reserved" else answer.peak.allocated_bytes


def compare(row: dict[str, str]) -> dict[str, Any]:
    """One row with our prediction, or the reason why there is none."""
    published = float(row["peak"]) * UNIT_BYTES[row["unit"]]
    result: dict[str, Any] = {
        "id": row["id"],
        "model": row["model"],
        "method": row["method"],
        "published_bytes": published,
    }
    reason = reason_against(row)
    if reason:
        return {**result, "not_planned": reason}
    request, assumed = request_of(row)
    answer = plan(request)
    predicted = our_bytes(answer, row["counter"])
    return {
        **result,
        "predicted_bytes": predicted,
        "relative_difference": predicted / published - 1,
        "assumed": assumed,
        "breakdown": answer.peak.breakdown.model_dump(),
        "complete": not assumed,
        "peers": peers_say(find_model(request.model).config, answer.model.num_parameters, request.training),
        "request": request.model_dump(mode="json"),
    }


def print_peers(rows: list[dict[str, Any]]) -> None:
    """Every estimator beside the published figure."""
    print(f"\n{'row':4} {'published':>10} {'ours':>8} " + " ".join(f"{name:>26}" for name in PEERS))
    for row in rows:
        if "peers" not in row:
            continue
        published = row["published_bytes"]
        answers = [f"{a / published - 1:+.1%}" if isinstance(a, int) else a[:26] for a in row["peers"].values()]
        print(
            f"{row['id']:4} {published / GIB:10.2f} {row['relative_difference']:+8.1%} "
            + " ".join(f"{answer:>26}" for answer in answers)
        )


def chunkft_peak() -> dict[str, Any]:
    """Llama-2-7B, 1024 tokens, bf16, checkpointing, fused loss, over K, beside the published 13.72 and the floor."""
    peaks = {}
    for num_chunks in (8, 16, 32, 64, 128):
        training = {"seq_len": 1024, "micro_batch_size": 1, "schedule": {"num_chunks": num_chunks}}
        answer = plan(PlanRequest.model_validate({"model": "llama-2-7b", "gpu": "rtx-4090", "training": training}))
        peaks[num_chunks] = answer.peak.model_dump()
    return {"published_gib": 13.72, "floor_gib": FLOOR_GIB, "peaks": peaks}


def print_chunkft(result: dict[str, Any]) -> None:
    """The acceptance line of Llama-2-7B."""
    print(
        "\nllama-2-7b, 1024 tokens, bf16, full checkpointing, fused loss: "
        f"published {result['published_gib']} GiB, floor {FLOOR_GIB} GiB"
    )
    for num_chunks, peak in result["peaks"].items():
        parts = ", ".join(f"{name} {size / GIB:.3f}" for name, size in peak["breakdown"].items() if size)
        where = f"chunk {peak['chunk_index']} {peak['phase']}"
        print(f"  K={num_chunks:<4} allocated {peak['allocated_bytes'] / GIB:.2f} GiB at {where}: {parts}")


def main() -> None:
    """Print both tables, write the results."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, default=HERE / "data" / "published_peaks.csv")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "published_peaks.json")
    arguments = parser.parse_args()
    with arguments.csv.open(newline="") as file:
        rows = [compare(row) for row in csv.DictReader(file)]
    print(f"{'row':4} {'model':38} {'published':>10} {'ours':>10} {'diff':>8}  remarks")
    for row in rows:
        published = f"{row['published_bytes'] / GIB:10.2f}"
        if "not_planned" in row:
            blank = f"{'-':>10} {'-':>8}"
            print(f"{row['id']:4} {row['model']:38} {published} {blank}  not planned: {row['not_planned']}")
            continue
        figures = f"{row['predicted_bytes'] / GIB:10.2f} {row['relative_difference']:+8.1%}"
        print(f"{row['id']:4} {row['model']:38} {published} {figures}  {'; '.join(row['assumed'])}")
    print_peers(rows)
    chunkft = chunkft_peak()
    print_chunkft(chunkft)
    command = " ".join(["python -m benchmarks.published_peaks", *sys.argv[1:]])
    content = {"command": command, "planner": PLANNER_VERSION, "rows": rows, "llama-2-7b": chunkft}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
