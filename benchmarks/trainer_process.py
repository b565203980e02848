"""Real trainer processes against their bounds: python -m benchmarks.trainer_process [--output FILE] [--fit].

Every case is a job as a service runs it: ``python -m chunkplan.engine.worker`` on a random model with a
tokenizer as large as its vocabulary, with evaluations and a checkpoint, for two cycles (from the second on
all states exist). Its highest resident memory is compared with the plan's ``device_bytes`` and
``upper_bytes``.

Cases fall into two halves by the digest of their names. A bound that is fitted to one half is judged on the
other, and the other way round. ``--fit`` writes half A as the planner's own calibration of the CPU: that half
B is then out of sample. Processes that were measured with the same engine are not run again, so that plans
can change without them; ``--minutes`` ends the work between two cases.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from itertools import islice
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from threading import Lock
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedTokenizerFast

from benchmarks.accuracy_cases import CONFIGS, Case, case, grid, llama_like
from benchmarks.planner_accuracy import build, versions
from chunkplan.engine.model.tasks import Task, task_of_config
from chunkplan.engine.spec import TrainingSpec
from chunkplan.engine.stream.schedule import Schedule
from chunkplan.planner import Plan, PlanRequest, plan
from chunkplan.planner.calibration.margins import BUILT_IN, Calibration, Margin, Observation, fit, write_calibration
from chunkplan.planner.catalog import find_gpu
from chunkplan.planner.catalog.overheads import overheads

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "trainer_process.json"
GRID_SHARE = 5
"""One in so many of the accuracy benchmark's cases is run as a process too."""
NUM_CYCLES = 2
_HOLD_NOTHING = ("device_lock", "errors", "spec", "worker")
"""Modules of the engine that measured processes do not depend on."""
_TORCH = Lock()
"""Held by who builds a model or plans: building one in 16 bits changes torch's default type for a moment."""

LARGER: dict[str, dict[str, Any]] = {
    "llama-58m": llama_like("llama", vocab_size=16000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8),
    "qwen2-95m": llama_like(
        "qwen2", vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=10,
        num_attention_heads=12, tie_word_embeddings=True,
    ),
    "smollm2-135m": llama_like(
        "llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "gpt2-124m": {
        "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "pythia-70m": {
        "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 512, "intermediate_size": 2048,
        "num_hidden_layers": 6, "num_attention_heads": 8, "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "bert-110m": {
        "model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512,
    },
    "mixtral-60m": llama_like(
        "mixtral", vocab_size=16000, hidden_size=384, intermediate_size=1024, num_hidden_layers=6,
        num_local_experts=6, num_experts_per_tok=2,
    ),
}  # fmt: skip


def cases() -> list[Case]:
    """What is run: a share of the accuracy benchmark's grid, by the digests of its names, and
    larger models.
    """
    small = [item for item in grid() if _is_runnable(item) and _digest(item.name) % GRID_SHARE == 0]
    return [*small, *_larger_cases()]


def _larger_cases() -> Iterator[Case]:
    short: dict[str, Any] = {"micro_batch_size": 1}
    for model in LARGER:
        yield case(model, num_chunks=2, **short)
        if model != "mixtral-60m":  # 16-bit experts grow: no bound of a steady process
            yield case(model, num_chunks=3, precision="bf16", activation_checkpointing="none")
    for model in ("llama-58m", "qwen2-95m", "gpt2-124m"):
        yield case(model, num_chunks=1, method="lora", **short)
        yield case(model, num_chunks=4, states="reset", switch_every=2, **short)
    for model in ("llama-58m", "pythia-70m"):
        yield case(model, num_chunks=1, loss="standard", activation_checkpointing="none")
        yield case(model, num_chunks=3, optimizer="adamw8bit", seq_len=256, **short)
        yield case(model, num_chunks=3, optimizer="lion", precision="bf16", seq_len=64, micro_batch_size=8)
    yield case("llama-58m", num_chunks=2, seq_len=512, activation_checkpointing="none")
    yield case("llama-58m", num_chunks=2, micro_batch_size=8, attention="eager")
    yield case("qwen2-95m", num_chunks=2, precision="bf16", seq_len=256, micro_batch_size=4)
    yield case("qwen2-95m", num_chunks=2, autocast="bf16")
    yield case("smollm2-135m", num_chunks=4, seq_len=256, precision="bf16", states="reset", **short)


def _is_runnable(item: Case) -> bool:
    """Whether rows can be made that fill the plan's batches.

    Batches are cut to multiples of 64 tokens, and a row's tokens are divided between encoder and decoder.
    """
    is_seq2seq = task_of_config(AutoConfig.for_model(**config_of(item))) is Task.SEQ2SEQ
    return item.training.seq_len % 64 == 0 and not is_seq2seq


def config_of(item: Case) -> dict[str, Any]:
    """As the model's folder has it: with the type of the weights in its file."""
    config = CONFIGS.get(item.model) or LARGER[item.model]
    return {**config, "dtype": {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[item.training.precision]}


def _digest(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def half_of(name: str) -> str:
    """Which half a case belongs to."""
    return "AB"[_digest(name) // GRID_SHARE % 2]


@cache
def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """As many entries as the model's vocabulary has, as published tokenizers do; every small letter is a
    token.

    Byte-level BPE, since some families' tokenizers are read as that whatever their file says.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    pieces = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    stems = [(stem, letter) for stem in ascii_uppercase for letter in ascii_uppercase]
    merges = list(islice(_growing(stems), max(vocab_size - len(pieces), 0)))
    pieces += [stem + letter for stem, letter in merges]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def _growing(merges: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The merges, then those that add a capital letter to what they make, and so on."""
    while True:
        yield from merges
        merges = [(stem + letter, further) for stem, letter in merges for further in ascii_uppercase]


def measure(item: Case) -> dict[str, Any]:
    """Train two cycles in a trainer's process.

    Returns:
        ``process_bytes``, its highest resident memory, and ``phases``: the highest while each phase ran.

    Raises:
        RuntimeError: the trainer failed; the message holds the end of its log.
    """
    training = item.training
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with _TORCH:
            _write_model(config_of(item), training, folder / "base")
        _write_rows(folder / "rows.jsonl", training)
        schedule = training.schedule
        assert not isinstance(schedule, str)
        updates = Schedule(schedule.num_chunks, schedule.order, schedule.switch_every).updates_per_cycle
        job = {
            "job_id": "benchmark", "name": "benchmark", "model_path": str(folder / "base"),
            "dataset_path": str(folder / "rows.jsonl"), "eval_fraction": 0.25, "output_name": "tuned",
            "training": {
                **training.model_dump(mode="json"), "learning_rate": 1e-5, "max_steps": NUM_CYCLES * updates,
                "checkpoint_every": updates,
            },
        }  # fmt: skip
        run_dir = folder / "run"
        log = run_dir / "attempts" / "1" / "log.txt"
        log.parent.mkdir(parents=True)
        (run_dir / "job.json").write_text(json.dumps(job))
        command = [sys.executable, "-m", "chunkplan.engine.worker", "--run-dir", str(run_dir), "--attempt", "1"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with log.open("w") as file:
            code = subprocess.run(
                command, stdout=file, stderr=file, env=environment, check=False, start_new_session=True
            ).returncode
        if code != 0:
            raise RuntimeError(f"the trainer ended with {code}: {log.read_text()[-2000:]}")
        events = [json.loads(line) for line in (log.parent / "events.jsonl").read_text().splitlines()]
    phases: dict[str, int] = {}
    for sample in (sample for event in events for sample in event.get("samples", [])):
        phases[sample["phase"]] = max(phases.get(sample["phase"], 0), sample["host_bytes"])
    process_bytes = next(event["process_peak_bytes"] for event in events if event["type"] == "finished")
    return {"process_bytes": process_bytes, "phases": phases}


def _write_model(config: dict[str, Any], training: TrainingSpec, folder: Path) -> None:
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    build(config, training).save_pretrained(folder)
    _tokenizer(config["vocab_size"]).save_pretrained(folder)


def _write_rows(path: Path, training: TrainingSpec) -> None:
    """Rows as long as a sequence; with packing half as long, so that two share one."""
    length = training.seq_len // 2 - 2 if training.packing else 2 * training.seq_len
    rows = 4 * training.micro_batch_size * training.gradient_accumulation_steps
    with path.open("w") as file:
        for row in range(rows):
            text = "".join(ascii_lowercase[(row * 7 + i + i // 31) % 26] for i in range(length))
            file.write(json.dumps({"text": text}) + "\n")


def planned(item: Case) -> Plan:
    """The plan of a case's job."""
    request = {"model": {"config": config_of(item)}, "gpu": "cpu", "training": item.training}
    with _TORCH:
        return plan(PlanRequest.model_validate(request))


def compared(item: Case, measured: dict[str, Any]) -> dict[str, Any]:
    """One row: what was measured beside today's plan."""
    answer = planned(item)
    return {
        "name": item.name,
        "half": half_of(item.name),
        "plan_id": answer.id,
        "weights_bytes": answer.model.parameter_bytes,
        "allocated_bytes": answer.peak.allocated_bytes,
        "device_bytes": answer.peak.device_bytes,
        "upper_bytes": answer.peak.upper_bytes,
        "growth_bytes": answer.peak.growth_bytes,
        **measured,
    }


def observations(rows: list[dict[str, Any]]) -> list[Observation]:
    """Rows as a calibration has them; processes that grow as long as they run are no observations."""
    return [
        Observation(
            plan_id=row["plan_id"],
            predicted_bytes=row["device_bytes"],
            weights_bytes=row["weights_bytes"],
            measured_bytes=row["process_bytes"],
        )
        for row in rows
        if not row["growth_bytes"]
    ]


def judged(rows: list[dict[str, Any]], bounds: list[int], runtime_bytes: int) -> dict[str, Any]:
    """How far bounds are above what was measured: of the whole process, and of what a run adds to its
    libraries.
    """
    pairs = [(row["process_bytes"], bound) for row, bound in zip(rows, bounds, strict=True) if not row["growth_bytes"]]
    above = [bound / process - 1 for process, bound in pairs]
    of_run = [(bound - process) / (process - runtime_bytes) for process, bound in pairs]
    return {
        "num_processes": len(rows),
        "num_growing": len(rows) - len(pairs),
        "num_below": sum(row["process_bytes"] > bound for row, bound in zip(rows, bounds, strict=True)),
        "mean_above": sum(above) / len(above),
        "least_above": min(above),
        "max_above": max(above),
        "mean_above_without_runtime": sum(of_run) / len(of_run),
    }


def result_of(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The output file."""
    halves = {half: [row for row in rows if row["half"] == half] for half in "AB"}
    gpu = find_gpu("cpu")
    runtime = overheads(gpu).runtime_bytes
    margins: dict[str, Margin] = {half: fit("cpu", observations(halves[half]), shipped=True) for half in halves}
    crossed = {}
    for fitted, other in ("AB", "BA"):
        if not halves[fitted] or not halves[other]:
            continue
        bounds = [
            margins[fitted].bound(row["device_bytes"], row["weights_bytes"]) + row["growth_bytes"]
            for row in halves[other]
        ]
        judgement = judged(halves[other], bounds, runtime)
        crossed[f"fitted on {fitted}, judged on {other}"] = {"margin": margins[fitted].model_dump(), **judgement}
    default = fit("cpu", [])
    defaults = [default.bound(row["device_bytes"], row["weights_bytes"]) + row["growth_bytes"] for row in rows]
    return {
        "command": " ".join(["python -m benchmarks.trainer_process", *sys.argv[1:]]),
        "versions": versions(),
        "c_library": "-".join(platform.libc_ver()),
        "engine": engine_version(),
        "seconds": round(seconds, 1),
        "runtime_bytes": runtime,
        "device_bytes": judged(rows, [row["device_bytes"] for row in rows], runtime),
        "default_bound": judged(rows, defaults, runtime),
        **crossed,
        "configs": {**CONFIGS, **LARGER},
        "runs": rows,
    }


@cache
def engine_version() -> str:
    """Digest of what the processes run, as far as it holds memory."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "engine").glob("*.py")):
        if path.stem not in _HOLD_NOTHING:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def measured_before(path: Path) -> tuple[dict[str, dict[str, Any]], float]:
    """Processes of this engine by the name of their case, and the seconds that they took."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}, 0.0
    if content.get("engine") != engine_version():
        return {}, 0.0
    kept = ("process_bytes", "phases")
    return {row["name"]: {key: row[key] for key in kept} for row in content["runs"]}, content["seconds"]


def main() -> None:
    """Run what is missing, compare, write the results."""
    parser = ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=60.0, help="no case begins later than this")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--fit", action="store_true", help="write half A as the planner's own calibration of the CPU")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    known, seconds = measured_before(arguments.output)
    items = sorted(cases(), key=lambda item: _digest(item.name))

    def save() -> list[dict[str, Any]]:
        rows = [compared(item, known[item.name]) for item in items if item.name in known]
        result = result_of(rows, seconds + time.perf_counter() - begin)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        partial = arguments.output.with_suffix(".partial")
        runs = ",\n".join(json.dumps(row) for row in result.pop("runs"))
        partial.write_text(f'{json.dumps(result, indent=1)[:-2]},\n "runs": [\n{runs}\n]}}\n')
        partial.replace(arguments.output)
        return rows

    def one(item: Case) -> tuple[Case, dict[str, Any]] | None:
        return (item, measure(item)) if time.perf_counter() < begin + 60 * arguments.minutes else None

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for future in as_completed([pool.submit(one, item) for item in items if item.name not in known]):
            done = future.result()
            if done is None:
                continue
            item, known[item.name] = done
            row = compared(item, known[item.name])
            error = row["device_bytes"] / row["process_bytes"] - 1
            print(f"{item.name:100} {row['process_bytes'] / 1e6:8.1f} {error:+8.2%}", flush=True)
            if len(known) % 8 == 0:
                save()
    rows = save()
    if arguments.fit:
        own = observations([row for row in rows if row["half"] == "A"])
        write_calibration(Calibration(devices={"cpu": own}), BUILT_IN)
    result = json.loads(arguments.output.read_text())
    for title, value in result.items():
        if title.startswith(("fitted", "default", "device")):
            print(title, json.dumps(value))
    print(f"{len(rows)} processes, in {result['seconds']} s")


if __name__ == "__main__":
    main()
