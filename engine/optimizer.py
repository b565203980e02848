"""AdamW on the active chunk, with states that live in host memory (keep) or only during a visit (reset).

States come to the device with a slice's first update of a visit and leave with its last. With one update per visit they therefore pass
through slice by slice: at no time are more than one slice's states on the device.

Every chunk has its own step count for bias correction, clipping sees the active chunk only, weight decay is decoupled.
bf16 weights are updated in fp32, block by block, and rounded stochastically: rounding to nearest would lose most small updates.
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

_BLOCK_NUMEL = 4 * 2**20
"""Elements of a bf16 weight that are updated at a time: 48 MiB of fp32 temporaries."""


@dataclass(slots=True)
class SliceStates:
    """First and second moments of one slice, fp32, [numel] each."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(slots=True)
class ChunkStates:
    """One chunk's states: its own number of updates, the run's number of its last one, its slices' moments where they live now."""

    num_updates: int = 0
    last_update: int = -1
    host: dict[int, SliceStates] = field(default_factory=dict)
    device: dict[int, SliceStates] = field(default_factory=dict)


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
        states.num_updates += 1
        states.last_update = visit.update
        for position, piece in enumerate(active):
            if piece.tensor.grad is not None:
                self.update_slice(states, position, piece, learning_rate)
            if visit.is_last:
                self.leave_slice(states, position)
        return norm

    def update_slice(self, states: ChunkStates, position: int, piece: ActiveSlice, learning_rate: float) -> None:
        """Bring the slice's states in if they are away, update its weights, release its gradient."""
        moments = states.device.get(position) or self._enter_slice(states, position, piece.tensor)
        gradient = piece.tensor.grad
        assert gradient is not None
        with torch.no_grad():
            if piece.tensor.dtype == torch.float32:
                self._apply(piece.tensor, gradient, moments, states.num_updates, learning_rate)
            else:
                self._apply_rounded(piece.tensor, gradient, moments, states.num_updates, learning_rate)
        del gradient
        piece.release_gradient()

    def leave_slice(self, states: ChunkStates, position: int) -> None:
        """Send the slice's states to the host (keep) or drop them (reset)."""
        moments = states.device.pop(position, None)
        if moments is None or self.config.states == "reset":
            return
        home = states.host.get(position)
        if home is None:
            numel, device = moments.exp_avg.numel(), moments.exp_avg.device
            home = states.host[position] = SliceStates(host_empty(numel, device), host_empty(numel, device))
        home.exp_avg.copy_(moments.exp_avg)
        home.exp_avg_sq.copy_(moments.exp_avg_sq)

    def _enter_slice(self, states: ChunkStates, position: int, leaf: Tensor) -> SliceStates:
        exp_avg = torch.zeros_like(leaf, dtype=torch.float32, requires_grad=False)
        exp_avg_sq = torch.zeros_like(exp_avg)
        home = states.host.get(position)
        if home is not None:
            exp_avg.copy_(home.exp_avg)
            exp_avg_sq.copy_(home.exp_avg_sq)
        moments = states.device[position] = SliceStates(exp_avg, exp_avg_sq)
        return moments

    def _apply(self, weight: Tensor, gradient: Tensor, moments: SliceStates, count: int, learning_rate: float) -> None:
        config = self.config
        step = torch.full((), float(count - 1), dtype=torch.float32, device=weight.device)
        adamw(
            [weight], [gradient], [moments.exp_avg], [moments.exp_avg_sq], [], [step],
            fused=True, amsgrad=False, beta1=config.beta1, beta2=config.beta2, lr=learning_rate,
            weight_decay=config.weight_decay, eps=config.eps, maximize=False,
        )  # fmt: skip

    def _apply_rounded(
        self, weight: Tensor, gradient: Tensor, moments: SliceStates, count: int, learning_rate: float
    ) -> None:
        for begin in range(0, weight.numel(), _BLOCK_NUMEL):
            block = slice(begin, begin + _BLOCK_NUMEL)
            exact = weight[block].float()
            part = SliceStates(moments.exp_avg[block], moments.exp_avg_sq[block])
            self._apply(exact, gradient[block].float(), part, count, learning_rate)
            weight[block].copy_(stochastic_round_(exact))
            del exact


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
    """Round fp32 to bf16 values in place, up or down with probability proportional to the distance. Returns ``exact``."""
    bits = exact.view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device)
    # The low half is cut off after the noise was added: a carry into the high half is rounding up.
    bits.add_(noise).bitwise_and_(-(2**16))
    return exact


def host_empty(numel: int, device: torch.device) -> Tensor:
    """fp32 host memory for states: pinned for a GPU; anonymous pages outside torch's allocator when the device is the CPU itself."""
    if device.type == "cpu":
        return torch.frombuffer(mmap.mmap(-1, max(4 * numel, 1)), dtype=torch.float32, count=numel)
    return torch.empty(numel, dtype=torch.float32, pin_memory=device.type == "cuda")
