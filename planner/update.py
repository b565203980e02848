"""Traces the engine's update of one slice: clipping, then its states and temporaries block by block. Imports torch."""

from __future__ import annotations

import torch
from torch import nn

from engine.gradients import ActiveSlice
from engine.models import DTYPES
from engine.optimizer import BLOCK_NUMEL, BlockKey, BlockStates, ChunkOptimizer, ChunkStates, OptimizerConfig, clip_
from engine.spec import Master, ScheduleSpec, StateDtype, TrainingSpec, state_sizes
from planner.memory import MemoryTrace
from planner.segments import CATEGORIES, EMBED, Block, StepTrace

_GRADIENTS, _STATES = CATEGORIES.index("gradients"), CATEGORIES.index("optimizer_states")
_WORKSPACE = CATEGORIES.index("workspace")


def trace_update(
    device_kind: str, numel: int, training: TrainingSpec, schedule: ScheduleSpec, comes: bool, leaves: bool
) -> StepTrace:
    """The engine's update of one slice. Block 0 is its gradient; then come the phases ``clip`` and ``optimizer``.

    Args:
        device_kind: decides which kernels run.
        numel: elements of the slice.
        training: decides the rule and the weights' precision.
        schedule: decides what is kept, how, and where.
        comes: the states come to the device with this update.
        leaves: they leave with it.
    """
    leaf = torch.empty(numel, dtype=DTYPES[training.precision], device="meta", requires_grad=True)
    piece = ActiveSlice("slice", 0, numel, leaf, nn.Parameter(torch.empty(0, device="meta")))
    optimizer = ChunkOptimizer(
        OptimizerConfig(
            rule=training.optimizer,
            states=schedule.states,
            state_dtype=schedule.state_dtype,
            master=schedule.master,
        )
    )
    states = ChunkStates(1)
    blocks = {(0, begin): min(BLOCK_NUMEL, numel - begin) for begin in range(0, numel, BLOCK_NUMEL)}
    if state_sizes(training, schedule).host:
        states.host = {key: _states(size, training, schedule, is_home=True) for key, size in blocks.items()}
    if not comes:
        states.device = {key: _states(size, training, schedule, is_home=False) for key, size in blocks.items()}
    there = [*states.host.values(), *states.device.values()]
    mode = MemoryTrace(device_kind)
    for tensor in (leaf, *(tensor for kept in there for tensor in kept.named().values())):
        mode.ignore(tensor)
    states.device = _Watched(mode, states.device)
    mode.category = _WORKSPACE
    with mode:
        mode.enter_segment("gradient", EMBED)
        leaf.grad = torch.empty_like(leaf, requires_grad=False)
        mode.enter_segment("clip", EMBED)
        clip_([piece], 1.0)
        mode.enter_segment("optimizer", EMBED)
        optimizer.update_slice(states, 0, piece, leaves, 1e-3)
        mode.enter_segment("end", EMBED)
    categories = {0: _GRADIENTS} | dict.fromkeys(states.device.blocks, _STATES)
    found = tuple(Block(size, categories.get(i, _WORKSPACE)) for i, size in enumerate(mode.sizes))
    return StepTrace(found, mode.finished_segments(), (numel,))


def _states(numel: int, training: TrainingSpec, schedule: ScheduleSpec, *, is_home: bool) -> BlockStates:
    """A block's states as the optimizer would have made them."""
    is_kept = not is_home or schedule.states == "keep"
    moments = training.optimizer.num_moments if is_kept else 0
    dtype = torch.float32 if schedule.state_dtype is StateDtype.FP32 else torch.bfloat16
    residual = torch.empty(numel, dtype=torch.int16, device="meta") if schedule.master is Master.RESIDUAL else None
    has_master = schedule.master is Master.FP32 and not is_home
    master = torch.empty(numel, dtype=torch.float32, device="meta") if has_master else None
    return BlockStates([torch.empty(numel, dtype=dtype, device="meta") for _ in range(moments)], residual, master)


class _Watched(dict[BlockKey, BlockStates]):
    """The optimizer's states on the device; remembers which blocks of the trace they were."""

    def __init__(self, mode: MemoryTrace, content: dict[BlockKey, BlockStates]) -> None:
        super().__init__(content)
        self._mode = mode
        self.blocks: set[int] = set()

    def __setitem__(self, key: BlockKey, kept: BlockStates) -> None:
        self.blocks |= {self._mode.block_of(tensor) for tensor in kept.named().values()}
        super().__setitem__(key, kept)
