"""Plans made by hand, for tests of what shows them."""

from chunkplan.planner.spec import Breakdown, ChunkPlan, ModelFacts, Peak, Plan, PlanRequest

GIB = 1 << 30


def make_plan(capacity_bytes=24 * GIB, num_chunks=4, allocated_bytes=18 * GIB, model="llama-3-8b", alternatives=()):
    """A plan of plausible figures whose breakdown sums to its peak; it fits when its upper bound does."""
    request = PlanRequest.model_validate(
        {"model": model, "gpu": "rtx-4090", "training": {"schedule": {"num_chunks": num_chunks}}}
    )
    rest = allocated_bytes - 15 * GIB
    peak = Peak(
        allocated_bytes=allocated_bytes,
        reserved_bytes=allocated_bytes + GIB // 4,
        device_bytes=allocated_bytes + GIB // 2,
        host_bytes=60 * GIB,
        upper_bytes=allocated_bytes + GIB,
        phase="backward",
        chunk_index=0,
        breakdown=Breakdown(
            weights=15 * GIB,
            gradients=rest // 4,
            optimizer_states=rest // 2,
            activations=rest - rest // 4 - rest // 2,
            loss=0,
            workspace=0,
            other=0,
        ),
    )
    chunks = [
        ChunkPlan(
            index=index,
            num_parameters=8_000_000_000 // num_chunks,
            first_parameter=f"model.layers.{index}.first",
            last_parameter=f"model.layers.{index}.last",
            peak_allocated_bytes=allocated_bytes - index * GIB // (4 * num_chunks),
            phase_peak_bytes={"forward": 16 * GIB, "backward": allocated_bytes, "optimizer": 17 * GIB},
            step_seconds=0.5,
        )
        for index in range(num_chunks)
    ]
    return Plan(
        id="plan_0123456789",
        planner_version="0",
        request=request,
        schedule=request.training.schedule,
        fits=peak.upper_bytes <= capacity_bytes,
        capacity_bytes=capacity_bytes,
        model=ModelFacts(
            name=model,
            architecture="LlamaForCausalLM",
            num_parameters=8_030_261_248,
            num_layers=32,
            parameter_bytes=16_060_522_496,
        ),
        peak=peak,
        chunks=chunks,
        step_seconds=0.5,
        tokens_per_second=2048.0,
        alternatives=list(alternatives),
        warnings=["prediction not yet calibrated for this device"],
    )
