"""Traces the engine's update of one slice: clipping, then its states and temporaries block by block. Imports torch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from engine.gradients import ActiveSlice
from engine.optimizer import BLOCK_NUMEL, AdamWConfig, BlockKey, ChunkAdamW, ChunkStates, Moments, clip_
from planner.memory import MemoryTrace
from planner.segments import CATEGORIES, EMBED, Block, StepTrace

_GRADIENTS, _STATES = CATEGORIES.index("gradients"), CATEGORIES.index("optimizer_states")
_WORKSPACE = CATEGORIES.index("workspace")


def trace_update(
    device_kind: str, numel: int, itemsize: int, policy: Literal["keep", "reset"], comes: bool, leaves: bool
) -> StepTrace:
    """The engine's update of one slice. Block 0 is its gradient; then come the phases ``clip`` and ``optimizer``.

    Args:
        device_kind: decides which kernels run.
        numel: elements of the slice.
        itemsize: bytes per element of its weights.
        policy: for the states.
        comes: the states come to the device with this update.
        leaves: they leave with it.
    """
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    leaf = torch.empty(numel, dtype=dtype, device="meta", requires_grad=True)
    piece = ActiveSlice("slice", 0, numel, leaf, nn.Parameter(torch.empty(0, device="meta")))
    optimizer = ChunkAdamW(AdamWConfig(states=policy))
    states = ChunkStates(1)
    blocks = {(0, begin): min(BLOCK_NUMEL, numel - begin) for begin in range(0, numel, BLOCK_NUMEL)}
    if policy == "keep":
        states.host = {key: _moments(size) for key, size in blocks.items()}
    if not comes:
        states.device = {key: _moments(size) for key, size in blocks.items()}
    there = [*states.host.values(), *states.device.values()]
    mode = MemoryTrace(device_kind)
    for tensor in (leaf, *(t for moments in there for t in (moments.exp_avg, moments.exp_avg_sq))):
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


def _moments(numel: int) -> Moments:
    return Moments(*(torch.empty(numel, dtype=torch.float32, device="meta") for _ in range(2)))


class _Watched(dict[BlockKey, Moments]):
    """The optimizer's states on the device; remembers which blocks of the trace they were."""

    def __init__(self, mode: MemoryTrace, content: dict[BlockKey, Moments]) -> None:
        super().__init__(content)
        self._mode = mode
        self.blocks: set[int] = set()

    def __setitem__(self, key: BlockKey, moments: Moments) -> None:
        self.blocks |= {self._mode.block_of(moments.exp_avg), self._mode.block_of(moments.exp_avg_sq)}
        super().__setitem__(key, moments)
