"""Predicted against measured, chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chunkplan.planner.calibration.residuals import STEP
from chunkplan.service.cli.output import console, mebibytes, percent, print_table


def print_residuals(residuals: Sequence[Mapping[str, Any]], title: str = "Peak memory by chunk") -> None:
    """One row per chunk: its highest phase, predicted and measured, and the difference.

    Args:
        residuals: as `chunkplan.planner.calibration.residuals` gives them, in JSON.
        title: printed above the table.
    """
    steps = [residual for residual in residuals if residual["phase"] == STEP]
    rows = [
        (
            str(step["chunk_index"]),
            _peak_phase(residuals, step["chunk_index"]),
            mebibytes(step["predicted_bytes"]),
            mebibytes(step["measured_bytes"]),
            percent(step["relative_error"]),
        )
        for step in steps
    ]
    print_table(title, [">chunk", "phase", ">predicted", ">measured", ">difference"], rows)
    if steps:
        errors = [step["relative_error"] for step in steps]
        mean = sum(map(abs, errors)) / len(errors)
        console().print(
            f"mean difference {mean:.2%}, largest {max(errors, key=abs):+.2%}, "
            f"furthest under {percent(min(errors)) if min(errors) < 0 else 'none'}"
        )


def _peak_phase(residuals: Sequence[Mapping[str, Any]], chunk_index: int) -> str:
    """The measured peak's phase."""
    phases = [item for item in residuals if item["chunk_index"] == chunk_index and item["phase"] != STEP]
    return str(max(phases, key=lambda item: item["measured_bytes"])["phase"]) if phases else ""
