"""Bounds from what runs measured: how far above its plan a run of a device may go, and how much longer it may
take.

A calibration is a file of observations, each a finished run beside its plan. What the planner takes from it
is computed when it is read, so that the data stay beside the figures that come from them. The file is
``CHUNKPLAN_CALIBRATION``, by default ``calibration.json`` beside the traces; ``chunkplan profiles calibrate``
writes it. Without a file, or for devices that it does not name, the observations that come with the planner
hold (``calibration.json`` in this package, from ``benchmarks.trainer_process``), and without any of those
:data:`DEFAULTS`. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Annotated

from pydantic import Field, ValidationError

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import SpecModel
from chunkplan.planner.paths import cache_dir
from chunkplan.planner.spec import GpuSpec, Plan, Result

_MIB = 2**20
BUILT_IN = Path(__file__).with_name("calibration.json")
MAX_OBSERVATIONS = 1000
"""Per device; the newest count."""
MIN_TIMES = 3
"""Runs with a measured time before times are corrected."""
MAX_TIME_RATIO = 8.0
DEFAULTS: Mapping[str, tuple[float, int]] = {
    "cpu": (0.05, 16 * _MIB),
    "cuda": (0.03, 96 * _MIB),
    "rocm": (0.06, 192 * _MIB),
    "mps": (0.10, 384 * _MIB),
}
"""Margins of devices that nobody has measured, by kind: share of all but the weights, and bytes on top.

CUDA's kernels' scratch is tabulated, not measured per device; ROCm and Apple devices are planned by its
rules.
"""


class Observation(SpecModel):
    """One finished run beside its plan. Device bytes: reserved and context on a GPU, the process
    on the CPU.
    """

    plan_id: str
    predicted_bytes: Annotated[int, Field(gt=0, le=2**50)]
    weights_bytes: Annotated[int, Field(ge=0, le=2**50)]
    measured_bytes: Annotated[int, Field(gt=0, le=2**50)]
    time_ratio: Annotated[float, Field(gt=0, lt=1e9)] | None = None
    """Measured over predicted time of an update, before any correction; None where it is not to be learned
    from."""

    @classmethod
    def of(
        cls, plan: Plan, *, reserved_bytes: int, process_bytes: int, step_seconds: float | None
    ) -> Observation | None:
        """What a finished run of a plan has shown; None where its memory is not known any more (0 bytes), or
        grew.
        """
        if plan.request.gpu == "cpu" or (isinstance(plan.request.gpu, GpuSpec) and plan.request.gpu.kind == "cpu"):
            measured = process_bytes
        else:
            measured = reserved_bytes and reserved_bytes + plan.peak.device_bytes - plan.peak.reserved_bytes
        if not measured or plan.peak.growth_bytes:
            return None
        return cls(
            plan_id=plan.id,
            predicted_bytes=plan.peak.device_bytes,
            weights_bytes=plan.model.parameter_bytes,
            measured_bytes=measured,
            time_ratio=None if not step_seconds else step_seconds / plan.step_seconds * plan.time_ratio,
        )

    @property
    def residual(self) -> float:
        """What was measured above the plan, as a share of all that is not weights."""
        return (self.measured_bytes - self.predicted_bytes) / max(self.predicted_bytes - self.weights_bytes, 1)


class Margin(Result):
    """What a device's observations say."""

    num_runs: int
    share: float
    """Share of all but the weights that is added to a plan's device bytes to bound it."""
    fixed_bytes: int
    time_ratio: float
    """Measured over predicted time of an update."""

    @property
    def version(self) -> str:
        """Equal for devices and files from which the same plans follow; ``default`` where nobody has
        measured.
        """
        if self.num_runs == 0:
            return "default"
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]

    def bound(self, device_bytes: int, weights_bytes: int) -> int:
        """The upper bound of a plan."""
        return device_bytes + int((device_bytes - weights_bytes) * self.share) + self.fixed_bytes

    def timed(self, gpu: GpuSpec) -> GpuSpec:
        """The device with rates that give the measured times."""
        names = ("memory_bandwidth", "bf16_flops", "fp32_flops", "link_bandwidth")
        return gpu.model_copy(update={name: getattr(gpu, name) / self.time_ratio for name in names})


def fit(kind: str, observations: Iterable[Observation], *, shipped: bool = False) -> Margin:
    """The margin of a device of a kind.

    Args:
        kind: the device's.
        observations: finished runs on it.
        shipped: they come with the planner, from another machine: the default's bytes stay whole, for
            libraries that take more here than there.

    The share is the highest residual, which a further run of the same sort exceeds with a chance of 1 in n +
    1, and the default's share over n + 1: a bound is never below anything that was measured, and few runs
    widen it. Times are corrected by the median of their ratios.
    """
    known = list(observations)[-MAX_OBSERVATIONS:]
    share, fixed_bytes = DEFAULTS[kind]
    highest = max([0.0, *(item.residual for item in known)])
    times = [item.time_ratio for item in known if item.time_ratio is not None]
    ratio = median(times) if len(times) >= MIN_TIMES else 1.0
    return Margin(
        num_runs=len(known),
        share=highest + share / (len(known) + 1),
        fixed_bytes=fixed_bytes if shipped else fixed_bytes // (len(known) + 1),
        time_ratio=min(max(ratio, 1 / MAX_TIME_RATIO), MAX_TIME_RATIO),
    )


class Calibration(SpecModel):
    """Observations by device: a GPU's name in the catalog, or ``cpu``."""

    devices: dict[str, list[Observation]] = Field(default_factory=dict)
    shipped: frozenset[str] = frozenset()
    """Devices whose observations come with the planner."""

    def margin(self, gpu: GpuSpec) -> Margin:
        """The margin of a device; of its kind's default where it has no observations."""
        key = device_key(gpu)
        return fit(gpu.kind, self.devices.get(key, []), shipped=key in self.shipped)


def device_key(gpu: GpuSpec) -> str:
    """Under which name a device's observations are kept."""
    return "cpu" if gpu.kind == "cpu" else gpu.name


def calibration_path() -> Path:
    """Where this user's calibration is kept."""
    given = os.environ.get("CHUNKPLAN_CALIBRATION")
    return Path(given) if given else cache_dir() / "calibration.json"


def calibration() -> Calibration:
    """The observations that hold now: the user's, and the planner's own of other devices.

    Raises:
        InputError: the user's file cannot be read.
    """
    path, shipped = calibration_path(), _read(BUILT_IN, 0).devices
    try:
        own = _read(path, path.stat().st_mtime_ns).devices
    except OSError:
        own = {}
    return Calibration(devices={**shipped, **own}, shipped=frozenset(shipped.keys() - own.keys()))


@lru_cache(maxsize=4)
def _read(path: Path, changed_ns: int) -> Calibration:
    try:
        return Calibration.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        problem = str(error).splitlines()[0]
        raise InputError("calibration", f"{path} cannot be read ({problem}): remove it, or write it anew") from error


def read_calibration(path: Path) -> Calibration:
    """The observations of a file; raises InputError where it cannot be read."""
    return _read(path, path.stat().st_mtime_ns if path.exists() else 0)


def write_calibration(found: Calibration, path: Path) -> None:
    """Replace a calibration file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as file:
        json.dump(found.model_dump(mode="json", include={"devices"}), file, indent=1)
    Path(file.name).replace(path)
