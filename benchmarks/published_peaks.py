"""Peaks measured on GPUs by others, beside ours: python -m benchmarks.published_peaks [--csv FILE] [--output
FILE].

A row can be planned when chunkplan has its method and optimizer, and its model, batch and length are stated.
What a row leaves open but its trainer's public code and settings say is taken from there (STATED); what
nobody says is assumed and named. Rows of which nothing had to be assumed are complete.

Plans are of chunkplan's own step. Where the row's trainer is known to hold more, the bytes follow from its
code and the row's shapes, are named, and give a second figure, "as run". Nothing is fitted to a row. Beside
ours stand the peers' estimates (benchmarks/peers.py).
"""

from __future__ import annotations

import csv
import json
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS, peers_say
from chunkplan.planner import Plan, PlanRequest, plan, timeline
from chunkplan.planner.catalog import find_model
from chunkplan.planner.version import planner_version

HERE = Path(__file__).parent
GIB = 2**30
UNIT_BYTES = {"GiB": GIB, "GB": 10**9, "B": 1, "GB as printed; GiB by arithmetic": GIB}
GPUS = {"a100": "a100-80gb", "unknown": "a100-80gb"}
MODELS = {"llama-7b": "llama-2-7b"}
"""Same shapes under another name."""
BLOCKS = "block, switch every 50"
EAGER = ("LOMO paper",)
"""Sources from before transformers had fused attention for Llama (4.36): their runs built the attention
matrix."""
STATED: dict[str, dict[str, Any]] = {
    # litgpt: finetune/full.py checkpoints activations on several devices only; the row's config has batches
    # of 32 in micro-batches of 4 and one device; the figure is torch.cuda.max_memory_allocated in 10**9
    # bytes.
    "P18": {"activation_checkpointing": "none", "gradient_accumulation_steps": 8},
}
"""What the code and settings behind a row say, which its table does not."""
LARGEST_BLOCK_SHARE = {"P13": 10}
"""One in so many parameters is in the row's largest block (receipt d_3b_block_k50: 311 of 3086 M, the
embedding)."""
BLOCK_ASSUMPTION = "chunks of the size of the row's largest block"
LENGTH_LIMIT = {"P13": "batches as long as the limit assumed", "P14": "batches as long as the limit assumed"}
"""Their batches are as long as the longest row, and 512 is a limit (the first batch was [4, 259])."""
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
    stated = STATED.get(row["id"], {})
    if "activation_checkpointing" in stated:
        assumed.clear()
    schedule: dict[str, Any] = {"num_chunks": 1, "switch_every": 3}
    if row["method"] == "chunkft":
        schedule = {"num_chunks": 32}
        assumed.append("32 chunks assumed")
    elif row["method"] == BLOCKS:
        chunks = LARGEST_BLOCK_SHARE[row["id"]]
        schedule = {"num_chunks": chunks, "switch_every": 50, "states": "reset", "master": "fp32"}
        assumed.append(BLOCK_ASSUMPTION)
    elif row["weights_dtype"] == "mixed":
        schedule["master"] = "fp32"
    elif row["optimizer"] != "adafactor":
        schedule["state_dtype"] = "bf16"  # torch's AdamW gives its moments the weights' type
    if row["id"] in LENGTH_LIMIT:
        assumed.append(LENGTH_LIMIT[row["id"]])
    fused = row["method"] == "chunkft" or "chunked cross-entropy" in row["notes"] or row["id"] == "P07"
    if "compile" in row["notes"] or row["id"] == "P07":
        assumed.append("compiled in the row, eager here")
    training = {
        "method": "chunkft" if row["method"] == BLOCKS else row["method"],
        "seq_len": int(row["seq_len"]), "micro_batch_size": int(row["micro_batch"]),
        "attention": "eager" if row["source"].startswith(EAGER) else "sdpa",
        "optimizer": "adafactor" if row["optimizer"] == "adafactor" else "adamw",
        "activation_checkpointing": checkpointing, "loss": "fused" if fused else "standard", "schedule": schedule,
        "precision": "fp16" if row["weights_dtype"] == "mixed" else "bf16", **stated,
    }  # fmt: skip
    gpu = GPUS.get(row["gpu"], row["gpu"])
    model = MODELS.get(row["model"], row["model"])
    return PlanRequest.model_validate({"model": model, "gpu": gpu, "training": training}), assumed


def our_bytes(answer: Plan, counter: str) -> int:
    """The counter of the plan that the row's figure is."""
    return answer.peak.reserved_bytes if counter == "reserved" else answer.peak.allocated_bytes


def as_run(row: dict[str, str], request: PlanRequest, answer: Plan) -> tuple[int, list[str]]:
    """The plan's bytes and what the row's trainer holds besides, by its code, with the reasons."""
    if row["source"].startswith(EAGER):
        return _lomo_bytes(request, answer)
    if row["optimizer"] == "adafactor":
        return _whole_tensor_adafactor_bytes(request, answer)
    return our_bytes(answer, row["counter"]), []


def _lomo_bytes(request: PlanRequest, answer: Plan) -> tuple[int, list[str]]:
    """Gradients throughout, and the tensors that transformers 4.28 to 4.30 kept of a Llama layer and today's
    does not.

    Both totals of the table hold 16 bytes per parameter: weights, gradients and states at once. torch before
    2.0 zeroes gradients rather than freeing them. The masked attention weights went through ``torch.max``
    with the type's least value, which keeps its input for backward, and norms multiplied their 16-bit input,
    which is kept beside its fp32 copy; both for every layer whose activations are live.
    """
    training, config = request.training, find_model(request.model).config
    gradients = answer.model.parameter_bytes
    points = timeline(request).points
    total = gradients + max(point.allocated_bytes - point.breakdown.gradients for point in points)
    tokens = training.micro_batch_size * training.seq_len
    attention = 2 * tokens * training.seq_len * config["num_attention_heads"]
    norms = 2 * 2 * tokens * config["hidden_size"]
    layers = answer.model.num_layers if training.activation_checkpointing == "none" else 1
    reasons = ["gradients kept between updates", "that time's eager attention and norms keep one tensor more each"]
    return total + layers * (attention + norms), reasons


def _whole_tensor_adafactor_bytes(request: PlanRequest, answer: Plan) -> tuple[int, list[str]]:
    """The Adafactor of transformers updates tensor by tensor, with four fp32 tensors of its size; ours goes
    by blocks.

    They are the gradient, the weights, the update, and the update's negative, while all gradients are there.
    """
    config = find_model(request.model).config
    largest = 4 * config["vocab_size"] * config["hidden_size"]
    updating = 2 * answer.model.parameter_bytes + answer.peak.breakdown.optimizer_states + 4 * largest
    return max(updating, answer.peak.allocated_bytes), ["its Adafactor holds four fp32 copies of the embedding"]


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
    run_bytes, reasons = as_run(row, request, answer)
    return {
        **result,
        "predicted_bytes": predicted,
        "relative_difference": predicted / published - 1,
        "as_run_bytes": run_bytes,
        "as_run_difference": run_bytes / published - 1,
        "held_besides": reasons,
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
    """Llama-2-7B, 1024 tokens, bf16, checkpointing, fused loss, over K, beside the published 13.72 and the
    floor.
    """
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
    print(f"{'row':4} {'model':38} {'published':>10} {'ours':>10} {'diff':>8} {'as run':>8}  remarks")
    for row in rows:
        published = f"{row['published_bytes'] / GIB:10.2f}"
        if "not_planned" in row:
            blank = f"{'-':>10} {'-':>8} {'-':>8}"
            print(f"{row['id']:4} {row['model']:38} {published} {blank}  not planned: {row['not_planned']}")
            continue
        figures = f"{row['predicted_bytes'] / GIB:10.2f} {row['relative_difference']:+8.1%}"
        remarks = "; ".join([*row["held_besides"], *row["assumed"]])
        print(f"{row['id']:4} {row['model']:38} {published} {figures} {row['as_run_difference']:+8.1%}  {remarks}")
    print_peers(rows)
    chunkft = chunkft_peak()
    print_chunkft(chunkft)
    command = " ".join(["python -m benchmarks.published_peaks", *sys.argv[1:]])
    content = {"command": command, "planner": planner_version(), "rows": rows, "llama-2-7b": chunkft}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
