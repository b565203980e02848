"""Updates the active chunk, with states that live in host memory (keep) or only during a visit (reset).

Slices are updated in blocks of 4 Mi elements. A block's states come to the device with its first update of a visit
and leave with its last: with one update per visit they pass through block by block, and the device never holds more
than one block's states.

Every chunk has its own step count for bias correction, clipping sees the active chunk only, weight decay is decoupled.
bf16 weights are updated in fp32; ``master`` says what becomes of the bits that they cannot hold.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from engine.gradients import ActiveSlice
from engine.rounding import join, split, stochastic_round_
from engine.rules import RULES, HyperParameters
from engine.schedule import Visit
from engine.spec import Master, Optimizer, StateDtype

BLOCK_NUMEL = 4 * 2**20
"""Elements updated at a time: AdamW's fp32 states of a block take 32 MiB, a bf16 weight's temporaries 48 MiB."""

BlockKey = tuple[int, int]
"""Ordinal of the slice within its chunk, and first element of the block within the slice."""


@dataclass(slots=True)
class BlockStates:
    """What is kept for a block of weights, [numel] each: moments, and the int16 residual or the fp32 master."""

    moments: list[Tensor]
    residual: Tensor | None = None
    master: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """All tensors by name."""
        named = {f"moment{i}": moment for i, moment in enumerate(self.moments)}
        if self.residual is not None:
            named["residual"] = self.residual
        if self.master is not None:
            named["master"] = self.master
        return named

    @staticmethod
    def of(named: dict[str, Tensor]) -> BlockStates:
        """Inverse of :meth:`named`."""
        moments = [named[name] for name in sorted(named) if name.startswith("moment")]
        return BlockStates(moments, named.get("residual"), named.get("master"))


@dataclass(slots=True)
class ChunkStates:
    """One chunk's states: how often it was updated, the run's number of its last update, and its blocks' states."""

    num_updates: int = 0
    last_update: int = -1
    host: dict[BlockKey, BlockStates] = field(default_factory=dict)
    device: dict[BlockKey, BlockStates] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OptimizerConfig(HyperParameters):
    """Which rule, its hyper-parameters, and what becomes of its states."""

    rule: Optimizer = Optimizer.ADAMW
    max_grad_norm: float | None = 1.0
    states: Literal["keep", "reset"] = "keep"
    state_dtype: StateDtype = StateDtype.FP32
    master: Master = Master.NONE


class ChunkOptimizer:
    """Updates one chunk at a time; see the module's docstring."""

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config
        self.chunks: dict[int, ChunkStates] = {}

    def update(self, active: list[ActiveSlice], visit: Visit, learning_rate: float) -> float | None:
        """Clip, update every slice, release its gradient. Returns the chunk's gradient norm, None without clipping."""
        norm = clip_(active, self.config.max_grad_norm)
        states = self.chunks.setdefault(visit.chunk_index, ChunkStates())
        if visit.is_first and self.config.states == "reset":
            states.num_updates = 0
            states.device.clear()
            for home in states.host.values():
                home.moments = []
        states.num_updates += 1
        states.last_update = visit.update
        for ordinal, piece in enumerate(active):
            self.update_slice(states, ordinal, piece, visit.is_last, learning_rate)
        if visit.is_last:
            for key in list(states.device):  # of slices that got no gradient this time
                self._leave(states, key)
        return norm

    def update_slice(
        self, states: ChunkStates, ordinal: int, piece: ActiveSlice, is_last: bool, learning_rate: float
    ) -> None:
        """Update the slice's weights block by block, then release its gradient; ``is_last`` sends its states away."""
        gradient = piece.tensor.grad
        if gradient is None:
            return
        weight = piece.tensor.detach()
        for begin in range(0, weight.numel(), BLOCK_NUMEL):
            block = slice(begin, begin + BLOCK_NUMEL)
            self._update_block(states, (ordinal, begin), weight[block], gradient[block], learning_rate)
            if is_last:
                self._leave(states, (ordinal, begin))
        del gradient
        piece.release_gradient()

    @torch.no_grad()
    def _update_block(
        self, states: ChunkStates, key: BlockKey, weight: Tensor, gradient: Tensor, learning_rate: float
    ) -> None:
        here = states.device.get(key) or self._enter(states, key, weight)
        exact = _exact(weight, here)
        moments = [moment.float() for moment in here.moments]
        rule = RULES[self.config.rule]
        rule(exact, gradient.float(), moments, states.num_updates, learning_rate, self.config)
        for stored, moment in zip(here.moments, moments, strict=True):
            if stored is not moment:
                stored.copy_(stochastic_round_(moment))
        del moments
        _write_back(exact, weight, here)

    def _enter(self, states: ChunkStates, key: BlockKey, weight: Tensor) -> BlockStates:
        """A block's states on the device: from the host, or new."""
        config, at_home = self.config, states.host.get(key)
        dtype = torch.float32 if config.state_dtype is StateDtype.FP32 else torch.bfloat16
        here = BlockStates([torch.zeros_like(weight, dtype=dtype) for _ in range(config.rule.num_moments)])
        if weight.dtype != torch.float32 and config.master is Master.RESIDUAL:
            here.residual = torch.zeros_like(weight, dtype=torch.int16)
        if weight.dtype != torch.float32 and config.master is Master.FP32:
            here.master = weight.float()
        states.device[key] = here
        if at_home is not None:
            named = here.named()
            for name, tensor in at_home.named().items():
                named[name].copy_(tensor)
        return here

    def _leave(self, states: ChunkStates, key: BlockKey) -> None:
        """Send a block's states to the host, or drop those that do not outlive the visit."""
        here = states.device.pop(key)
        here.master = None
        if self.config.states == "reset":
            here.moments = []
        staying = here.named()
        if not staying:
            return
        if key not in states.host:
            states.host[key] = BlockStates.of({name: host_like(tensor) for name, tensor in staying.items()})
        at_home = states.host[key].named()
        for name, tensor in staying.items():
            at_home[name].copy_(tensor)


def _exact(weight: Tensor, here: BlockStates) -> Tensor:
    """The fp32 weights to update: the weights themselves, the master, or a new tensor."""
    if here.master is not None:
        return here.master
    if here.residual is not None:
        return join(weight, here.residual)
    return weight.float()


def _write_back(exact: Tensor, weight: Tensor, here: BlockStates) -> None:
    if weight.dtype == torch.float32:
        return
    if here.residual is not None:
        split(exact, weight, here.residual)
    elif here.master is not None:
        weight.copy_(exact)
    else:
        weight.copy_(stochastic_round_(exact))


def clip_(active: list[ActiveSlice], max_norm: float | None) -> float | None:
    """Scale the active gradients in place so that their total norm is at most ``max_norm``; returns the norm before."""
    gradients = [piece.tensor.grad for piece in active if piece.tensor.grad is not None]
    if max_norm is None or not gradients:
        return None
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    total = torch.linalg.vector_norm(torch.stack(norms))
    factor = (max_norm / (total + 1e-6)).clamp_(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
    return 0.0 if total.device.type == "meta" else float(total)


def host_like(tensor: Tensor) -> Tensor:
    """Host memory for a state: pinned for a GPU; when the device is the CPU, pages outside torch's allocator."""
    if tensor.device.type == "cpu":
        pages = mmap.mmap(-1, max(tensor.numel() * tensor.element_size(), 1))
        return torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel())
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
