"""The benchmarks that take minutes, one after the other: ``make bench``. README.md lists the longer ones."""

from __future__ import annotations

import subprocess
import sys

MODULES = ("engine", "planner_accuracy", "planner_speed", "published_peaks")


def main() -> int:
    """Run each as a process of its own; 1 if any of them failed."""
    failed = []
    for name in MODULES:
        print(f"\n# {name}\n", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode != 0:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
