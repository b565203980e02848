"""Trainings that plans are compared with on a GPU: what comes first, and a grid for what time is left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.accuracy_cases import CONFIGS
from chunkplan.engine.spec import TrainingSpec
from chunkplan.planner.catalog import find_model

MODELS = ("llama-3.2-1b", "qwen2.5-0.5b", "gpt2-medium", "pythia-410m", "gemma-2-2b")
TINY = ("llama", "qwen2", "gpt2")


@dataclass(frozen=True)
class Case:
    """One run: a catalog model (on the CPU a tiny one of the accuracy benchmark) and a training spec."""

    model: str
    training: TrainingSpec

    @property
    def name(self) -> str:
        """Unique in the grid."""
        t = self.training
        states = f"{t.optimizer} {t.schedule.state_dtype} states"
        kind = f"{t.method} {states} K={t.schedule.num_chunks} switch={t.schedule.switch_every} {t.loss} {t.precision}"
        return f"{self.model} {kind} {t.micro_batch_size}x{t.seq_len} checkpointing={t.activation_checkpointing}"

    @property
    def config(self) -> dict[str, Any]:
        """The model's config."""
        return CONFIGS[self.model] if self.model in CONFIGS else find_model(self.model).config


def headline() -> Iterator[Case]:
    """What is measured first: 0.5 to 8 billion weights, chunks, checkpointing, optimizers, adapters."""
    for model, num_chunks, batch, length, changes in (
        ("llama-3.2-1b", 8, 2, 2048, {}),
        ("gemma-2-2b", 32, 1, 1024, {}),
        ("llama-3-8b", 32, 1, 2048, {"optimizer": "adafactor"}),
        ("llama-3-8b", 1, 1, 2048, {"method": "lora"}),
        ("llama-3.2-1b", 32, 1, 1024, {"activation_checkpointing": "none"}),
        ("llama-3.2-1b", 1, 1, 2048, {}),
        ("llama-3-8b", 8, 1, 4096, {"optimizer": "adafactor"}),
        ("llama-3.2-3b", 8, 1, 2048, {"state_dtype": "bf16"}),
        ("llama-3.2-3b", 32, 1, 2048, {"activation_checkpointing": "none", "optimizer": "adafactor"}),
        ("qwen2.5-0.5b", 8, 4, 512, {"activation_checkpointing": "none"}),
        ("llama-3.2-1b", 1, 4, 1024, {"method": "lora", "activation_checkpointing": "none"}),
        ("llama-3-8b", 32, 1, 2048, {"optimizer": "adamw8bit"}),
    ):
        asked: dict[str, Any] = {"seq_len": length, "micro_batch_size": batch, "method": "chunkft", **changes}
        kept = {"state_dtype": asked.pop("state_dtype")} if "state_dtype" in asked else {}
        asked["attention"] = "eager" if model.startswith("gemma") else "sdpa"
        if asked["method"] == "chunkft":
            asked["schedule"] = {"num_chunks": num_chunks, "switch_every": 2 if num_chunks == 1 else 1, **kept}
        yield Case(model, TrainingSpec.model_validate(asked).resolved())


def grid(models: tuple[str, ...]) -> Iterator[Case]:
    """Families by number of chunks, batch, length and checkpointing; every run visits all positions of its
    chunks.

    The cases that differ most come first, so that a short time sees something of everything.
    """
    sizes = ((1, 1024), (4, 512), (1, 4096), (8, 128), (2, 2048))
    for batch, length in sizes:
        for checkpointing in ("full", "none"):
            for num_chunks in (8, 32, 1):
                for model in models:
                    if model.startswith("gpt2") and length > 1024:
                        continue  # as many positions as it has learned
                    training = {
                        "seq_len": length,
                        "micro_batch_size": batch, "activation_checkpointing": checkpointing,
                        "loss": "fused" if num_chunks > 1 else "standard", "method": "chunkft",
                        "attention": "eager" if model.startswith("gemma") else "sdpa",
                        "schedule": {"num_chunks": num_chunks, "switch_every": 2 if num_chunks == 1 else 1},
                    }  # fmt: skip
                    yield Case(model, TrainingSpec.model_validate(training).resolved())
