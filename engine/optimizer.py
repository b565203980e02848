"""AdamW on the active chunk, with states that live in host memory (keep) or only during a visit (reset).

Slices are updated in blocks of 4 Mi elements. A block's states come to the device with its first update of a visit
and leave with its last: with one update per visit they pass through block by block, and the device never holds more
than one block's states.

Every chunk has its own step count for bias correction, clipping sees the active chunk only, weight decay is decoupled.
bf16 weights are updated in fp32 and rounded stochastically: rounding to nearest would lose most small updates.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from engine.gradients import ActiveSlice
from engine.schedule import Visit

BLOCK_NUMEL = 4 * 2**20
"""Elements that are updated at a time: 32 MiB of states, and for bf16 weights 48 MiB of fp32 temporaries."""

BlockKey = tuple[int, int]
"""Ordinal of the slice within its chunk, and first element of the block within the slice."""


@dataclass(slots=True)
class Moments:
    """First and second moments of one block, fp32, [numel] each."""

    exp_avg: Tensor
    exp_avg_sq: Tensor

    def copy_(self, other: Moments) -> None:
        """Take over the other's values, from wherever they are."""
        self.exp_avg.copy_(other.exp_avg)
        self.exp_avg_sq.copy_(other.exp_avg_sq)


@dataclass(slots=True)
class ChunkStates:
    """One chunk's states: its own number of updates, the run's number of its last one, and its blocks' moments."""

    num_updates: int = 0
    last_update: int = -1
    host: dict[BlockKey, Moments] = field(default_factory=dict)
    device: dict[BlockKey, Moments] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AdamWConfig:
    """Hyper-parameters of AdamW and the policy for its states."""

    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    states: Literal["keep", "reset"] = "keep"


class ChunkAdamW:
    """Updates one chunk at a time; see the module's docstring."""

    def __init__(self, config: AdamWConfig) -> None:
        self.config = config
        self.chunks: dict[int, ChunkStates] = {}

    def update(self, active: list[ActiveSlice], visit: Visit, learning_rate: float) -> float | None:
        """Clip, update every slice, release its gradient. Returns the chunk's gradient norm, None without clipping."""
        norm = clip_(active, self.config.max_grad_norm)
        states = self.chunks.setdefault(visit.chunk_index, ChunkStates())
        if visit.is_first and self.config.states == "reset":
            states.num_updates = 0
            states.host.clear()
            states.device.clear()
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
        moments = states.device.get(key) or self._enter(states, key, weight)
        if weight.dtype == torch.float32:
            self._adamw(weight, gradient, moments, states.num_updates, learning_rate)
            return
        exact = weight.float()
        self._adamw(exact, gradient.float(), moments, states.num_updates, learning_rate)
        weight.copy_(stochastic_round_(exact))

    def _enter(self, states: ChunkStates, key: BlockKey, weight: Tensor) -> Moments:
        """Moments of a block on the device: from the host, or zero."""
        zeros = (torch.zeros_like(weight, dtype=torch.float32) for _ in range(2))
        moments = states.device[key] = Moments(*zeros)
        if key in states.host:
            moments.copy_(states.host[key])
        return moments

    def _leave(self, states: ChunkStates, key: BlockKey) -> None:
        """Send a block's moments to the host (keep) or drop them (reset)."""
        moments = states.device.pop(key)
        if self.config.states == "reset":
            return
        if key not in states.host:
            numel, device = moments.exp_avg.numel(), moments.exp_avg.device
            states.host[key] = Moments(host_empty(numel, device), host_empty(numel, device))
        states.host[key].copy_(moments)

    def _adamw(self, weight: Tensor, gradient: Tensor, moments: Moments, count: int, learning_rate: float) -> None:
        config = self.config
        step = torch.full((), float(count - 1), dtype=torch.float32, device=weight.device)
        adamw(
            [weight], [gradient], [moments.exp_avg], [moments.exp_avg_sq], [], [step],
            fused=True, amsgrad=False, beta1=config.beta1, beta2=config.beta2, lr=learning_rate,
            weight_decay=config.weight_decay, eps=config.eps, maximize=False,
        )  # fmt: skip


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


def stochastic_round_(exact: Tensor) -> Tensor:
    """Round fp32 to bf16 values in place, up or down, so that the mean is exact. Returns ``exact``."""
    bits = exact.view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device)
    # The low half is cut off after the noise was added: a carry into the high half is rounding up.
    bits.add_(noise).bitwise_and_(-(2**16))
    return exact


def host_empty(numel: int, device: torch.device) -> Tensor:
    """fp32 host memory for states: pinned for a GPU; when the device is the CPU, pages outside torch's allocator."""
    if device.type == "cpu":
        return torch.frombuffer(mmap.mmap(-1, max(4 * numel, 1)), dtype=torch.float32, count=numel)
    return torch.empty(numel, dtype=torch.float32, pin_memory=device.type == "cuda")
