"""Requests that tests start from."""

from pathlib import Path
from typing import Any

from tests.conftest import TINY_MODEL
from tests.support.live import TRAINING


def job_request(dataset: Path, **training: Any) -> dict[str, Any]:
    """A small job on the tiny model that passes every check."""
    return {
        "name": "tiny",
        "model": TINY_MODEL,
        "training": {**TRAINING, "max_steps": 8, **training},
        "dataset": {"path": str(dataset)},
    }
