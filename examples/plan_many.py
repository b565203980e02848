"""Which GPU holds this fine-tuning run, and how fast? Needs neither a GPU nor weights.

    python examples/plan_many.py [MODEL] [GPU ...]

MODEL is a catalog id, a Hugging Face name of the catalog, or a folder with a config.json.
"""

import sys
from pathlib import Path

from planner import PlanRequest, plan


def main(model: str = "smollm2-135m-instruct", *gpus: str) -> None:
    asked = {"path": model} if Path(model).is_dir() else model
    print(f"{'GPU':16} {'fits':5} {'chunks':>6} {'needs':>10} {'of':>10} {'tokens/s':>9}")
    for gpu in gpus or ("rtx-3060-12gb", "rtx-4090", "a100-80gb"):
        answer = plan(PlanRequest.model_validate({"model": asked, "gpu": gpu, "training": {"schedule": "auto"}}))
        needs, of = answer.peak.upper_bytes / 2**30, answer.capacity_bytes / 2**30
        print(
            f"{gpu:16} {'yes' if answer.fits else 'no':5} {answer.schedule.num_chunks:6} "
            f"{needs:6.2f} GiB {of:6.2f} GiB {answer.tokens_per_second:9.0f}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
