"""Memory and time of reading a large data set: python -m benchmarks.data_memory [--gigabytes N] [--output
FILE].

Writes a JSONL file of generated rows, then, each in a process of its own, checks it row by row, and
tokenizes, packs and batches it. Growth is the highest resident set that the operating system recorded, less
what the process held before. The numbers of bytes are decimal: 1 GB is 10^9.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from chunkplan.engine.data import Batches, check_dataset, load_dataset

RESULTS = Path(__file__).parent / "results" / "data_memory.json"
LIMIT_BYTES = 200 * 10**6
SEQ_LEN = 1024
NUM_BATCHES = 2000


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of invented words whose frequencies fall as those of a language do."""
    generator = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(generator.choices(letters, k=generator.randint(2, 10))) for _ in range(20_000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    return [" ".join(generator.choices(words, weights, k=generator.randint(5, 25))) + "." for _ in range(count)]


def write_rows(path: Path, num_bytes: int) -> int:
    """A JSONL file of that size; returns the number of rows, which have 1 kB on average."""
    known, generator = sentences(20_000), random.Random(1)
    size = num_rows = 0
    with path.open("w") as file:
        while size < num_bytes:
            text = " ".join(generator.choices(known, k=max(1, int(generator.gammavariate(2, 4)))))
            size += file.write(json.dumps({"text": text, "id": num_rows}) + "\n")
            num_rows += 1
    return num_rows


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 8000 tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(sentences(2000), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")  # noqa: S106


def check(path: Path, folder: Path) -> Callable[[], dict[str, Any]]:
    """Every row read and checked, as a submission does."""
    return lambda: {"num_rows": check_dataset(path).num_rows}


def train(path: Path, folder: Path) -> Callable[[], dict[str, Any]]:
    """Tokenized, packed, and batches taken across the end of an epoch, as a run does."""
    tokenize = tokenizer()

    def run() -> dict[str, Any]:
        begin = time.perf_counter()
        splits = load_dataset(path, "auto", tokenize, SEQ_LEN, 0.01, 0, packing=True, folder=folder)
        seconds = time.perf_counter() - begin
        batches = Batches(splits.train, 8, 0)
        last = batches.num_batches_per_epoch
        num_tokens = 0
        for index in range(max(0, last - NUM_BATCHES // 2), last + NUM_BATCHES // 2):
            num_tokens += sum(len(example.input_ids) for example in batches.batch(index))
        return {
            "num_rows": splits.stats.num_rows,
            "num_train_tokens": splits.stats.num_train_tokens,
            "packing_density": splits.stats.packing_density,
            "tokenize_seconds": round(seconds, 1),
            "num_batches": NUM_BATCHES,
            "num_tokens_in_batches": num_tokens,
        }

    return run


STAGES = {"check": check, "train": train}


def _measure(stage: str, path: Path, folder: Path, results: Any) -> None:
    run = STAGES[stage](path, folder)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    begin = time.perf_counter()
    found = run()
    seconds = time.perf_counter() - begin
    status = Path("/proc/self/status").read_text()
    highest = 1024 * int(status.split("VmHWM:")[1].split()[0])
    results.put({"stage": stage, "seconds": round(seconds, 1), "growth_bytes": highest - before, **found})


def measure(stage: str, path: Path, folder: Path) -> dict[str, Any]:
    """One stage in a fresh process.

    Raises:
        RuntimeError: it failed.
    """
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_measure, args=(stage, path, folder, results))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{stage} ended with code {process.exitcode}")
    return dict(results.get())


def main() -> int:
    """Generate, measure, print, write; 1 if memory grew by more than it may."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        begin = time.perf_counter()
        num_rows = write_rows(path, int(arguments.gigabytes * 1e9))
        print(f"{path.stat().st_size:,} bytes, {num_rows:,} rows written in {time.perf_counter() - begin:.0f} s")
        stages = []
        for stage in STAGES:
            stages.append(measure(stage, path, Path(folder) / "tokens"))
            print(json.dumps(stages[-1]), flush=True)
        result = {
            "command": " ".join(["python -m benchmarks.data_memory", *sys.argv[1:]]),
            "versions": {"python": platform.python_version(), "numpy": np.__version__},
            "cores": os.cpu_count(),
            "file_bytes": path.stat().st_size,
            "seq_len": SEQ_LEN,
            "limit_bytes": LIMIT_BYTES,
            "stages": stages,
        }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(stage["growth_bytes"] > LIMIT_BYTES for stage in stages))


if __name__ == "__main__":
    sys.exit(main())
