"""What a plan request and a plan look like. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from chunkplan.engine.spec import AskedTraining, ModelRef, ResolvedSchedule, SpecModel, TrainingSpec

Rate = Annotated[float, Field(ge=1e6, le=1e21)]
"""Per second: no device is slower, and times stay finite."""


class GpuSpec(SpecModel):
    """A device as the planner sees it: a catalog row, or given inline. Rates are dense, without sparsity."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    memory_bytes: Annotated[int, Field(gt=0, le=2**50)]
    """Memory that one process can really use (what the driver reports as total)."""
    kind: Literal["cuda", "rocm", "mps", "cpu"] = "cuda"
    """``mps`` (Apple) is planned only: the engine does not run there."""
    vendor: str = "nvidia"
    compute_capability: str | None = None
    """``8.9`` for Ada; decides the context and workspace sizes."""
    memory_bandwidth: Rate = 5e11
    """Bytes per second."""
    bf16_flops: Rate = 5e13
    """Dense bf16 FLOP/s with fp32 accumulation."""
    fp16_flops: Rate | None = None
    """None: as bf16. Before Ampere, tensor cores know fp16 only."""
    fp32_flops: Rate = 2e13
    link_bandwidth: Rate = 1.6e10
    """Host to device, bytes per second, one direction, achievable."""
    context_bytes: Annotated[int, Field(ge=0, le=2**50)] | None = None
    """CUDA context and loaded libraries; None takes the planner's table
    (chunkplan.planner.catalog.overheads), here and below."""
    workspace_bytes: Annotated[int, Field(ge=0, le=2**50)] | None = None
    """One matrix-multiplication workspace of cuBLAS."""
    driver_reserved_bytes: Annotated[int, Field(ge=0, le=2**50)] | None = None
    """Part of ``memory_bytes`` that no process gets."""
    runtime_bytes: Annotated[int, Field(ge=0, le=2**50)] | None = None
    """Host memory of the process before any model."""
    cuda_version: Annotated[str, Field(pattern=r"^\d{1,3}\.\d{1,3}$")] | None = None
    """CUDA version of the process's libraries, which decides the context's size; None: that of
    PyPI's wheels.
    """
    power_watts: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Highest sustained power of the board (Apple: of the machine); energy is estimated with it."""
    price_usd: Annotated[float, Field(ge=0, le=1e9)] | None = None
    """List price when it came out."""
    price_source: str | None = None
    """Month of the list price."""
    rent_usd_per_hour: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """What an hour costs; a job's cost is estimated with it."""
    rent_source: str | None = None
    """Month and source of the rent."""
    source: str = "given in the request"


class RunLength(SpecModel):
    """How long a run is: exactly one of ``max_steps`` and ``dataset_tokens``, or both without ``epochs``."""

    dataset_tokens: Annotated[int, Field(ge=1, le=2**60)] | None = None
    """Tokens of one epoch, with padding: rows × ``seq_len`` where rows are not packed."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Passes over the data set; default 1."""
    max_steps: Annotated[int, Field(ge=1, le=2**53)] | None = None
    """Optimizer updates."""

    @model_validator(mode="after")
    def _is_known(self) -> RunLength:
        if self.max_steps is None and self.dataset_tokens is None:
            raise ValueError("give dataset_tokens, max_steps, or both")
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("give max_steps or epochs, not both")
        return self


GpuRef = Annotated[str, Field(min_length=1, max_length=128)] | GpuSpec


class PlanRequest(SpecModel):
    """One question: does this training run of this model fit this device?"""

    model: ModelRef
    gpu: GpuRef
    gpu_count: Literal[1] = 1
    memory_limit_bytes: Annotated[int, Field(gt=0, le=2**50)] | None = None
    """Use at most this much of the device; None uses all of it."""
    training: AskedTraining = Field(default_factory=lambda: TrainingSpec().normalised())
    run: RunLength | None = None
    """Only for the plan's ``time``."""


class Result(BaseModel):
    """Base of what the planner returns."""

    model_config = ConfigDict(frozen=True)


class Breakdown(Result):
    """Bytes by category at one moment; the sum is the allocated bytes of that moment."""

    weights: int
    gradients: int
    optimizer_states: int
    activations: int
    loss: int
    workspace: int
    other: int

    @property
    def total_bytes(self) -> int:
        """Sum over the categories, bytes."""
        return sum(self.model_dump().values())


class Peak(Result):
    """The moment of the highest memory, and the other counters at their own maxima. Bytes."""

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int
    host_bytes: int
    upper_bytes: int
    growth_bytes: int = 0
    """Part of ``upper_bytes`` by which the process may grow during the run (16-bit experts on the CPU)."""
    phase: str
    chunk_index: int
    breakdown: Breakdown


class ModelFacts(Result):
    """What was planned for."""

    name: str
    architecture: str
    num_parameters: int
    """Adapters included."""
    num_trainable_parameters: int | None = None
    """All of them, or the adapters'; None in plans of earlier versions."""
    num_layers: int
    parameter_bytes: int

    @property
    def num_base_parameters(self) -> int:
        """Number of parameters without adapters."""
        trainable = self.num_trainable_parameters
        return self.num_parameters - trainable if trainable not in (None, self.num_parameters) else self.num_parameters


class ChunkPlan(Result):
    """One chunk of the schedule: its range of the stream, its peaks by phase, its step time."""

    index: int
    num_parameters: int
    first_parameter: str
    last_parameter: str
    peak_allocated_bytes: int
    phase_peak_bytes: dict[str, int]
    """Peak allocated bytes within each phase of a step: forward, backward, optimizer."""
    step_seconds: float


class Alternative(Result):
    """Another schedule with its figures and one sentence why it is named."""

    role: Literal["chosen", "pareto", "nearest", "smallest"] = "nearest"
    """``nearest`` that fits; ``smallest`` where none does; of a front: ``chosen``, and ``pareto`` for all
    others."""
    schedule: ResolvedSchedule
    training: TrainingSpec
    peak: Peak
    step_seconds: float
    fits: bool
    why: str


class PhasePeak(Result):
    """The highest moment of one phase over the whole run. Bytes."""

    phase: str
    """load; forward, loss (the end of forward), backward and optimizer of a step; switch (between two
    chunks); evaluation; checkpoint; export."""
    allocated_bytes: int
    """On the device."""
    host_bytes: int | None
    """Host memory of the process; None where the device is the host, whose ``Peak.device_bytes``
    has it all.
    """
    chunk_index: int | None
    """Which chunk's step it is; None outside of steps."""


class RunTime(Result):
    """How long, how much energy, how much money: of training steps alone, without loading, evaluations and
    writing.
    """

    cycle_seconds: float
    """Until every chunk was visited once."""
    dense_step_seconds: float | None
    """Seconds of the same update by dense fine-tuning, states on the device, fitting or not; None with
    adapters.
    """
    num_updates: int | None = None
    """Updates of the run; like what follows None unless the request says how long it is."""
    epoch_seconds: float | None = None
    """None unless the request has ``dataset_tokens``."""
    run_seconds: float | None = None
    energy_kwh: float | None = None
    """At the device's highest sustained power; None when it is not known."""
    cost_usd: float | None = None
    """At the device's rent; None when it is not known."""


class Plan(Result):
    """The answer. Content-addressed: the same request and planner version give the same id."""

    id: str
    planner_version: str
    calibration: str | None = None
    """Version of the observations behind ``upper_bytes`` and the times; None in plans of earlier versions."""
    time_ratio: float = 1.0
    """What those observations made of the times: they are this many times as long as without."""
    request: PlanRequest
    fits: bool
    capacity_bytes: int
    model: ModelFacts
    peak: Peak
    schedule: ResolvedSchedule
    """The schedule that the figures are for: the request's, or the one that ``auto`` chose."""
    chunks: list[ChunkPlan]
    step_seconds: float
    """Mean over a cycle of one optimizer update."""
    tokens_per_second: float
    time: RunTime | None = None
    """None in plans of earlier versions, like ``phases``."""
    phases: list[PhasePeak] | None = None
    alternatives: list[Alternative]
    """When it does not fit: what does, or the smallest there is."""
    pareto: list[Alternative] = []
    """Front of ``schedule: auto``: the chosen one first, then what is faster, smaller, or easier on
    the host.
    """
    warnings: list[str]

    @property
    def device_name(self) -> str:
        """What the device is called."""
        return self.request.gpu if isinstance(self.request.gpu, str) else self.request.gpu.name


class TimelinePoint(Result):
    """Live bytes by category at the peak of one segment (a layer in a phase) of one chunk's step."""

    chunk_index: int
    phase: str
    segment: str
    seconds: float
    """Since the start of the cycle."""
    allocated_bytes: int
    breakdown: Breakdown


class Timeline(Result):
    """The footprint over one cycle, in the schedule's order."""

    plan_id: str
    capacity_bytes: int
    points: list[TimelinePoint]
