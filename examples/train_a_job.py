"""Write a job file and train it without a server: checked, planned, run, and compared with its plan.

    python examples/train_a_job.py MODEL_FOLDER DATA_FILE

The same file can be sent to a service: ``chunkplan submit job.json --watch``.
"""

import json
import subprocess
import sys
from pathlib import Path


def main(model_folder: str, data_file: str) -> None:
    job = {
        "name": "example",
        "model": {"path": model_folder},
        "gpu": "cpu",
        "training": {
            "seq_len": 64,
            "precision": "fp32",
            "schedule": {"num_chunks": 4},
            "learning_rate": 1e-3,
            "max_steps": 8,
        },
        "dataset": {"path": data_file, "eval_fraction": 0.1},
    }
    Path("job.json").write_text(json.dumps(job, indent=2))
    command = [sys.executable, "-m", "chunkplan.service.cli", "train", "job.json", "--run-dir", "run"]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
