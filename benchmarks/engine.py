"""The engine beside dense AdamW, BAdam, GaLore and LoRA: python -m benchmarks.engine [--output FILE]
[--rounds N].

One model for all (134 M parameters, hidden 768, 12 layers, vocabulary 32000, fp32), 2 sequences of 512
tokens, full checkpointing and fused loss for all. Every method lives in a process of its own, one after the
other; dense AdamW's lives throughout and does an update before every four of theirs, so that a noisy machine
disturbs both alike: what is printed are ratios to the dense steps of the same run. Peaks come from the
allocator's own record, FLOPs from torch's counter over the operations that really ran; beside them stand the
formulas of docs/engine.md.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "engine.json"
SEQ_LEN, BATCH_SIZE = 512, 2
CONFIG = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
NUM_BADAM_BLOCKS = 14
"""12 layers, the embedding, the head."""


@dataclass(frozen=True)
class Method:
    """What one process does."""

    name: str
    optimizer: str = "chunkft"
    options: dict[str, Any] = field(default_factory=dict)
    num_updates: int = 2
    """A cycle, or two steps: the first makes the states, the second finds them."""


def methods() -> list[Method]:
    """All that are compared; the first is what the others are measured by."""
    chunks = [
        Method(f"chunkft K={count} {order}", options={"num_chunks": count, "order": order}, num_updates=count)
        for count, order in ((16, "descending"), (4, "ascending"), (8, "descending"), (32, "descending"))
    ]
    expanded = {"num_chunks": 16, "order": "descending", "expansion": "factored"}
    return [
        Method("dense AdamW", "adamw", num_updates=3),
        *chunks,
        Method("chunkft K=16 expansion", options=expanded, num_updates=16),
        Method("BAdam 1.4", "badam", num_updates=NUM_BADAM_BLOCKS),
        Method("GaLore 1.0", "galore", num_updates=3),
        Method("LoRA r=16", "lora", num_updates=3),
    ]


def serve(connection: Connection, method: Method) -> None:
    """A method's process: one update whenever the parent says so, until it says no more."""
    os.environ["KINETO_LOG_LEVEL"] = "99"
    import time

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.methods import OPTIMIZERS, chunkft, usual_loop
    from chunkplan.engine.record.profiler import CpuProfiler
    from chunkplan.engine.spec import StepSpec
    from chunkplan.engine.training.step import prepared

    torch.manual_seed(0)
    profiler = CpuProfiler()
    with ExitStack() as stack, profiler.step():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG), dtype=torch.float32).train()
        if method.optimizer == "chunkft":
            update = chunkft(model, lambda _: 1e-5, profiler, activation_checkpointing="full", **method.options)
        else:
            options = StepSpec()
            optimizer = OPTIMIZERS[method.optimizer](model)
            stack.enter_context(prepared(model, options))
            update = usual_loop(model, optimizer, lambda _: 1e-5, profiler, options)
        stack = stack.pop_all()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, CONFIG["vocab_size"], (BATCH_SIZE, SEQ_LEN), generator=generator)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    connection.send({"weights_bytes": weights, "num_parameters": sum(p.numel() for p in model.parameters())})
    number = 0
    while (counting := connection.recv()) is not None:
        with counted_flops() if counting else nullcontext() as counter, profiler.step():
            begin, processor = time.perf_counter(), time.process_time()
            update(number, {"input_ids": ids, "labels": ids})
            seconds, processor = time.perf_counter() - begin, time.process_time() - processor
        peak = max(sample.allocated_bytes for sample in profiler.samples)
        flops = counter.get_total_flops() if counter else 0
        connection.send({"seconds": seconds, "processor_seconds": processor, "peak_bytes": peak, "flops": flops})
        number += 1


@contextmanager
def counted_flops() -> Iterator[Any]:
    """Torch's counter, taught the CPU's flash attention, which it misses."""
    import torch
    from torch.utils import flop_counter

    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(
            q, k, v
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda upstream, q, k, v, *_, **__: (
            flop_counter.sdpa_backward_flop_count(upstream, q, k, v)
        ),
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        yield counter


class Process:
    """A method's process, from the parent's side."""

    def __init__(self, method: Method) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, method), daemon=True)
        self.process.start()
        other.close()
        self.about = self.connection.recv()

    def update(self, *, counting: bool = False) -> dict[str, Any]:
        """One update; its seconds, peak and, if asked, FLOPs."""
        self.connection.send(counting)
        result: dict[str, Any] = self.connection.recv()
        return result

    def close(self) -> None:
        """Let the process end."""
        self.connection.send(None)
        self.process.join()


def theoretical_flops(method: Method) -> list[float] | None:
    """FLOPs of every update of the method's cycle by the formulas of docs/engine.md; None where there is
    none.
    """
    if method.optimizer == "adamw":
        return [chunk_flops(1, 0)] * method.num_updates
    if method.optimizer != "chunkft" or "expansion" in method.options:
        return None
    count = method.options["num_chunks"]
    indices = range(count) if method.options["order"] == "ascending" else reversed(range(count))
    return [chunk_flops(count, index) for index in indices]


def chunk_flops(num_chunks: int, index: int) -> float:
    """One update with one chunk active: matrix products and attention, with full checkpointing and the fused
    loss.
    """
    from chunkplan.engine.stream.chunks import partition

    num_tokens, num_layers = SEQ_LEN * BATCH_SIZE, CONFIG["num_hidden_layers"]
    infos = _parameters()
    active = {infos[piece.index].name: piece.numel for piece in partition(infos, num_chunks)[index].slices}
    product = {name: 2 * num_tokens * rows * columns for name, (rows, columns) in _MATRICES.items()}
    attention = 4 * num_tokens * SEQ_LEN * CONFIG["hidden_size"]
    head = 2 * num_tokens * CONFIG["vocab_size"] * CONFIG["hidden_size"]
    layer = sum(product.values()) + attention
    flops = num_layers * layer + head
    if set(active) != {"lm_head.weight"}:
        flops += head  # the gradient of the states
    flops += 2 * 2 * num_tokens * active.get("lm_head.weight", 0)  # logits of these rows again, then their gradient
    lowest = min((int(name.split(".")[1]) for name in active if name.startswith("layers.")), default=num_layers)
    is_below = "embed_tokens.weight" in active
    for number in range(0 if is_below else lowest, num_layers):
        flops += layer - product["mlp.down_proj"]  # recomputed up to what was saved last
        inside = {
            name.split(".", 2)[2].removesuffix(".weight") for name in active if name.startswith(f"layers.{number}.")
        }
        flops += 2 * num_tokens * sum(active[f"layers.{number}.{name}.weight"] for name in inside & set(_MATRICES))
        for name, upstream in _UPSTREAM.items():
            if is_below or number > lowest or inside & upstream:
                flops += 2.5 * attention if name == "attention" else product[name]
    return flops


_WIDTH, _INNER = CONFIG["hidden_size"], CONFIG["intermediate_size"]
_MATRICES = {
    "self_attn.q_proj": (_WIDTH, _WIDTH), "self_attn.k_proj": (_WIDTH, _WIDTH), "self_attn.v_proj": (_WIDTH, _WIDTH),
    "self_attn.o_proj": (_WIDTH, _WIDTH), "mlp.gate_proj": (_INNER, _WIDTH), "mlp.up_proj": (_INNER, _WIDTH),
    "mlp.down_proj": (_WIDTH, _INNER),
}  # fmt: skip
_FIRST = {"input_layernorm"}
_QKV = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"} | _FIRST
_BEFORE_MLP = {"self_attn.o_proj", "post_attention_layernorm"} | _QKV
_UPSTREAM = {
    "self_attn.q_proj": _FIRST, "self_attn.k_proj": _FIRST, "self_attn.v_proj": _FIRST, "attention": _QKV,
    "self_attn.o_proj": _QKV, "mlp.gate_proj": _BEFORE_MLP, "mlp.up_proj": _BEFORE_MLP,
    "mlp.down_proj": _BEFORE_MLP | {"mlp.gate_proj", "mlp.up_proj"},
}  # fmt: skip
"""Parameters of the lowest active layer for whose sake the gradient must pass through each of its operations.
"""


def _parameters() -> Any:
    from chunkplan.engine.stream.chunks import ParameterInfo

    layer = {**_MATRICES, "input_layernorm": (_WIDTH,), "post_attention_layernorm": (_WIDTH,)}
    infos = [ParameterInfo("embed_tokens.weight", (CONFIG["vocab_size"], _WIDTH), 4)]
    for index in range(CONFIG["num_hidden_layers"]):
        infos += [ParameterInfo(f"layers.{index}.{name}.weight", shape, 4) for name, shape in layer.items()]
    head = ParameterInfo("lm_head.weight", (CONFIG["vocab_size"], _WIDTH), 4)
    return [*infos, ParameterInfo("norm.weight", (_WIDTH,), 4), head]


def measure(asked: list[Method], rounds: int) -> dict[str, Any]:
    """Run the methods side by side; the rows of the table."""
    dense = Process(asked[0])
    dense.update()  # makes the states
    flops: dict[str, list[float]] = {}
    results: dict[str, list[dict[str, Any]]] = {method.name: [] for method in asked}
    beside = results[asked[0].name]
    for method in asked[1:]:
        process = Process(method)
        for number in range(rounds * method.num_updates):
            if number % 4 == 0:
                beside.append(dense.update())
            result = process.update()
            results[method.name].append({**result, "share": result["seconds"] / beside[-1]["seconds"]})
        # Counted apart: torch's counter keeps tensors alive that the step has freed, and takes time.
        flops[method.name] = [process.update(counting=True)["flops"] for _ in range(method.num_updates)]
        process.close()
        print(f"{method.name}: {len(results[method.name])} updates", file=sys.stderr, flush=True)
    flops[asked[0].name] = [dense.update(counting=True)["flops"]]
    dense.close()
    rows = [_row(method, results[method.name], flops[method.name], rounds) for method in asked]
    return {"weights_bytes": dense.about["weights_bytes"], "rows": rows}


def _row(method: Method, results: list[dict[str, Any]], flops: list[float], rounds: int) -> dict[str, Any]:
    count = method.num_updates
    first, steady = results[:count], results
    if method.name.startswith(("GaLore", "LoRA")):
        steady = results[1:]  # the first update makes the states, GaLore's also the projections
    theory = theoretical_flops(method)
    shares = [result.get("share", 1.0) for result in steady]
    # The same chunk of every round: its median; then the mean over the cycle.
    by_chunk = [statistics.median(shares[i::count]) for i in range(count)] if steady is results else shares
    return {
        "method": method.name,
        "share_of_dense_step": round(statistics.mean(by_chunk), 3),
        "shares_by_update": [round(share, 3) for share in by_chunk],
        "peak_bytes": max(result["peak_bytes"] for result in results),
        "peaks_by_update": [result["peak_bytes"] for result in first],
        "gflop": round(statistics.mean(flops) / 1e9, 1),
        "gflop_by_update": [round(count / 1e9, 1) for count in flops],
        "gflop_theory": round(statistics.mean(theory) / 1e9, 1) if theory else None,
        "gflop_theory_by_update": [round(count / 1e9, 1) for count in theory] if theory else None,
        "rounds": rounds,
    }


def print_table(result: dict[str, Any]) -> None:
    """The rows, and what the planner says of the peak."""
    print(f"{'method':<26} {'step / dense':>12} {'cheapest':>9} {'peak / weights':>15} {'GFLOP':>8} {'formula':>8}")
    for row in result["rows"]:
        peak = row["peak_bytes"] / result["weights_bytes"]
        theory = f"{row['gflop_theory']:>8.0f}" if row["gflop_theory"] else f"{'':>8}"
        print(
            f"{row['method']:<26} {row['share_of_dense_step']:>12.3f} {min(row['shares_by_update']):>9.3f} "
            f"{peak:>15.3f} {row['gflop']:>8.0f} {theory}"
        )
    for name, size_bytes in result["planned_breakdown"].items():
        print(f"  planned, K=16 descending, {name}: {size_bytes / 2**20:.1f} MiB")


def planned_breakdown() -> dict[str, int]:
    """Where each byte is at the planned peak of the first chunk schedule."""
    from chunkplan.engine.spec import parse
    from chunkplan.planner import PlanRequest, plan

    training = {
        "seq_len": SEQ_LEN, "micro_batch_size": BATCH_SIZE, "precision": "fp32", "schedule": {"num_chunks": 16},
    }  # fmt: skip
    answer = plan(parse(PlanRequest, {"model": {"config": CONFIG}, "gpu": "cpu", "training": training}))
    return {"allocated": answer.peak.allocated_bytes, **answer.peak.breakdown.model_dump()}


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=1, help="cycles of every method")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="beside dense, only methods whose name has it")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    import torch

    dense, *others = methods()
    asked = [method for method in others if not arguments.only or any(word in method.name for word in arguments.only)]
    result = {
        "command": " ".join(["python -m benchmarks.engine", *sys.argv[1:]]),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **measure([dense, *asked], arguments.rounds),
        "planned_breakdown": planned_breakdown(),
    }
    print_table(result)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
