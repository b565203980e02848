"""What requests look like: shown in the API's description, and tried out by its contract test."""

from __future__ import annotations

from typing import Any

PLAN: dict[str, Any] = {
    "model": "smollm2-135m-instruct",
    "gpu": "rtx-4090",
    "training": {"seq_len": 128, "schedule": {"num_chunks": 8}},
}
COMPARISON: dict[str, Any] = {
    "model": "smollm2-135m-instruct",
    "gpus": ["rtx-4090", "rtx-3060-12gb"],
    "methods": ["chunkft", "full"],
    "training": {"seq_len": 128, "schedule": {"num_chunks": 8}},
}
JOB: dict[str, Any] = {
    "name": "demo",
    "model": "smollm2-135m-instruct",
    "gpu": "cpu",
    "dataset": {"path": "data.jsonl"},
    "training": {
        "precision": "fp32",
        "seq_len": 128,
        "micro_batch_size": 8,
        "learning_rate": 1e-3,
        "max_steps": 32,
        "schedule": {"num_chunks": 8, "switch_every": 2},
    },
}

FINE_TUNING: dict[str, Any] = {
    "model": "smollm2-135m-instruct",
    "training_file": "file_01k9z0y8w7e6rt5y4u3i2o1p0a",
    "suffix": "sums",
    "seed": 7,
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8}}},
    "chunkplan": {"training": {"precision": "fp32", "seq_len": 128, "schedule": {"num_chunks": 8}}},
}
