"""Traces the engine's update of one slice: clipping, then its states and temporaries block by block. Imports
torch.
"""

from __future__ import annotations

import torch
from torch import nn

from chunkplan.engine.gradients.activation import ActiveSlice
from chunkplan.engine.model.loading import DTYPES
from chunkplan.engine.optimizer.chunk_optimizer import ChunkOptimizer, OptimizerConfig, clip_
from chunkplan.engine.optimizer.eight_bit import tables
from chunkplan.engine.optimizer.state_layout import StateLayout, StateTensor
from chunkplan.engine.optimizer.state_transfer import WHOLE, BlockKey, ChunkStates, Lane, States
from chunkplan.engine.spec import Master, ResolvedSchedule, TrainingSpec
from chunkplan.engine.stream.schedule import Visit
from chunkplan.planner.trace.recorder import Known, MemoryTrace
from chunkplan.planner.trace.step_trace import CATEGORIES, EMBED, Block, StepTrace

_GRADIENTS, _STATES = CATEGORIES.index("gradients"), CATEGORIES.index("optimizer_states")
_WORKSPACE = CATEGORIES.index("workspace")


def trace_update(
    device_kind: str,
    numel: int,
    num_columns: int,
    training: TrainingSpec,
    schedule: ResolvedSchedule,
    *,
    comes: bool,
    leaves: bool,
    is_shared: bool = False,
    known: Known | None = None,
) -> StepTrace:
    """The engine's update of one slice. Block 0 is its gradient; then come the phases ``clip`` and
    ``optimizer``.

    Args:
        device_kind: decides which kernels run, and whether states travel beside the updates.
        numel: elements of the slice.
        num_columns: elements of its last dimension.
        training: decides the rule and the precision of what is trained.
        schedule: decides what is kept, how, and where.
        comes: the states come to the device with this update.
        leaves: they leave with it.
        known: see :class:`chunkplan.planner.trace.recorder.MemoryTrace`.
        is_shared: buffers that the whole chunk's states pass through are there already.
    """
    leaf = torch.empty(numel, dtype=DTYPES[training.trained_precision], device="meta", requires_grad=True)
    parameter = nn.Parameter(torch.empty(numel // num_columns, num_columns, device="meta"))
    piece = ActiveSlice("slice", 0, numel, leaf, parameter)
    config = OptimizerConfig.of(training.resolved(schedule))
    optimizer = ChunkOptimizer(config, Lane(ahead=0 if device_kind == "cpu" else 1))
    optimizer.loss_scale = 2.0 if training.scales_loss else 1.0
    states = optimizer.chunks[0] = ChunkStates()
    optimizer.begin(Visit(0, 0, 0, is_first=comes, is_last=leaves), 1e-3)
    _fill(states, StateLayout.of(training, schedule), numel, num_columns, on_device=not comes)
    transfer = optimizer.transfer([(0, piece)]) if is_shared else None
    mode = MemoryTrace(device_kind, known)
    for buffer, _ in transfer.spare if transfer else []:
        for tensor in buffer.values():
            mode.ignore(tensor)
    for tensor in (
        leaf,
        *(t for there in (states.host, states.device) for kept in there.values() for t in kept.values()),
    ):
        mode.ignore(tensor)
    for is_signed in (True, False):
        tables(is_signed, leaf.device)  # made once for a whole run, not in an update
    states.device = _Watched(mode, states.device)
    mode.category = _WORKSPACE
    with mode:
        mode.enter_segment("gradient", EMBED)
        leaf.grad = torch.empty_like(leaf, requires_grad=False)
        mode.enter_segment("clip", EMBED)
        clip_([piece], 1.0, optimizer.loss_scale)
        mode.enter_segment("optimizer", EMBED)
        optimizer.update_slice(0, piece, transfer)
        mode.enter_segment("end", EMBED)
    categories = {0: _GRADIENTS} | dict.fromkeys(states.device.blocks, _STATES)
    found = tuple(Block(size, categories.get(i, _WORKSPACE)) for i, size in enumerate(mode.sizes))
    return StepTrace(found, mode.finished_segments(), (numel,))


def _fill(states: ChunkStates, layout: StateLayout, numel: int, num_columns: int, *, on_device: bool) -> None:
    """The states of the slice as earlier updates would have left them."""
    for begin, size in [(WHOLE, numel), *layout.blocks(numel, num_columns)]:
        tensors = layout.of_slice(numel, num_columns) if begin == WHOLE else layout.of_block(size)
        staying = {name: tensor for name, tensor in tensors.items() if layout.stays(name)}
        if staying:
            states.host[0, begin] = _made(staying)
        if on_device:
            if layout.master is Master.FP32 and begin != WHOLE:
                tensors["master"] = StateTensor(size, "float32")
            states.device[0, begin] = _made(tensors)


def _made(tensors: dict[str, StateTensor]) -> States:
    return {
        name: torch.empty(tensor.numel, dtype=getattr(torch, tensor.dtype), device="meta")
        for name, tensor in tensors.items()
    }


class _Watched(dict[BlockKey, States]):
    """The optimizer's states on the device; remembers which blocks of the trace they were."""

    def __init__(self, mode: MemoryTrace, content: dict[BlockKey, States]) -> None:
        super().__init__(content)
        self._mode = mode
        self.blocks: set[int] = set()

    def __setitem__(self, key: BlockKey, kept: States) -> None:
        self.blocks |= {self._mode.block_of(tensor) for tensor in kept.values()}
        super().__setitem__(key, kept)
