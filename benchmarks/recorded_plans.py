"""Answers recorded requests again: ``python -m benchmarks.recorded_plans [--write] [FILE]``.

The file holds requests over models, devices, methods and options, and what the planner answered. A change
that should leave plans alone is proved by an empty list of differences; one that should not is followed by
``--write``. Figures belong to the versions of torch and transformers in constraints.txt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "tests" / "planner" / "recorded_plans.json"


def answered(request: dict[str, Any]) -> dict[str, Any]:
    """What the planner says: its main figures and a digest of the whole plan, or the refusal."""
    from chunkplan.engine import InputError
    from chunkplan.engine.spec import parse
    from chunkplan.planner import PlanRequest, plan

    try:
        found = plan(parse(PlanRequest, request))
    except InputError as error:
        return {"field": error.field, "message": error.message}
    whole = found.model_dump(mode="json", exclude={"id", "planner_version"})
    peak = found.peak
    return {
        "fits": found.fits,
        "num_chunks": found.schedule.num_chunks,
        "allocated_bytes": peak.allocated_bytes,
        "reserved_bytes": peak.reserved_bytes,
        "host_bytes": peak.host_bytes,
        "upper_bytes": peak.upper_bytes,
        "step_seconds": found.step_seconds,
        "sha256": hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16],
    }


def main() -> int:
    """Print every request whose answer is another one; 1 if there is any."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recorded_plans", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=FILE)
    parser.add_argument("--write", action="store_true", help="record today's answers")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # decides what kernels of the CPU take
    rows = json.loads(arguments.file.read_text())
    differences = 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["CHUNKPLAN_CACHE_DIR"] = cache
        for row in rows:
            answer = answered(row["request"])
            if answer != row.get("answer"):
                differences += 1
                if not arguments.write:
                    print(json.dumps({"request": row["request"], "was": row.get("answer"), "is": answer}))
            row["answer"] = answer
    print(f"{len(rows)} plans, {differences} of them differ")
    if arguments.write:
        lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
        arguments.file.write_text(f"[\n{lines}\n]\n")
    return int(bool(differences) and not arguments.write)


if __name__ == "__main__":
    raise SystemExit(main())
