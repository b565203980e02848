"""A case of the accuracy benchmark as a job runs it: ``python -m engine.worker`` on a random model, and its memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedTokenizerFast

from engine.models import DTYPES
from engine.schedule import Schedule
from engine.spec import Precision, TrainingSpec
from engine.tasks import task_of_config

ROOT = Path(__file__).parents[1]


def is_runnable(training: TrainingSpec) -> bool:
    """Whether rows can be made that fill the plan's batches: texts are cut into pieces of a multiple of 64 tokens."""
    return training.seq_len % 64 == 0


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    """Words are tokens, so that a row's length is known."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    words = [*special.values(), *(f"w{number}" for number in range(7000))]
    vocabulary = {word: number for number, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def process_peak_bytes(config: dict[str, Any], training: TrainingSpec) -> int:
    """Train one cycle in a trainer's process; its highest resident memory.

    Raises:
        RuntimeError: the trainer failed; the message holds the end of its log.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_model(config, training.precision, folder / "base")
        _write_rows(folder / "rows.jsonl", training)
        schedule = training.schedule
        assert not isinstance(schedule, str)
        settings = training.model_dump(mode="json")
        updates = Schedule(schedule.num_chunks, schedule.order, schedule.switch_every).updates_per_cycle
        job = {
            "job_id": "benchmark", "name": "benchmark", "model_path": str(folder / "base"),
            "dataset_path": str(folder / "rows.jsonl"), "eval_fraction": 0.0, "output_name": "tuned",
            "training": {**settings, "learning_rate": 1e-5, "max_steps": updates, "checkpoint_every": 10_000},
        }  # fmt: skip
        run_dir = folder / "run"
        log = run_dir / "attempts" / "1" / "log.txt"
        log.parent.mkdir(parents=True)
        (run_dir / "job.json").write_text(json.dumps(job))
        command = [sys.executable, "-m", "engine.worker", "--run-dir", str(run_dir), "--attempt", "1"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with log.open("w") as file:
            code = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False).returncode
        if code != 0:
            raise RuntimeError(f"the trainer ended with {code}: {log.read_text()[-2000:]}")
        events = [json.loads(line) for line in (log.parent / "events.jsonl").read_text().splitlines()]
        return int(next(event["process_peak_bytes"] for event in events if event["type"] == "finished"))


def _write_model(config: dict[str, Any], precision: Precision, folder: Path) -> None:
    torch.manual_seed(0)
    parsed = AutoConfig.for_model(**config)
    model = task_of_config(parsed).auto_class.from_config(parsed, dtype=DTYPES[precision])
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _write_rows(path: Path, training: TrainingSpec) -> None:
    """Rows as long as a sequence; with packing half as long, so that two share one."""
    length = training.seq_len // 2 - 2 if training.packing else 2 * training.seq_len
    rows = 4 * training.micro_batch_size * training.gradient_accumulation_steps
    with path.open("w") as file:
        for row in range(rows):
            text = " ".join(f"w{(row * 31 + i) % 7000}" for i in range(length))
            file.write(json.dumps({"text": text}) + "\n")
