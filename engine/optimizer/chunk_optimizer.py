"""Updates the active chunk, with states that live in host memory (keep) or only during a visit (reset).

Slices are updated in blocks of 4 Mi elements. A block's states come to the device with its first update of a
visit and leave with its last: with one update per visit they pass through block by block, and the device
never holds more than one block's states, or two where copies run beside the updates
(:mod:`chunkplan.engine.optimizer.state_transfer`).

Every chunk has its own step count for bias correction, clipping sees the active chunk only, weight decay is
decoupled. 16-bit weights are updated in fp32; ``master`` says what becomes of the bits that they cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Generator, Tensor

from chunkplan.engine.gradients.activation import ActiveSlice
from chunkplan.engine.optimizer.eight_bit import dequantise, quantise
from chunkplan.engine.optimizer.factored import FactoredUpdate
from chunkplan.engine.optimizer.rounding import Noise, join, split, stochastic_round_
from chunkplan.engine.optimizer.rules import DEFAULT_BETAS, RULES, HyperParameters, decay_
from chunkplan.engine.optimizer.state_layout import MOMENT_SIGNS, StateLayout, StateTensor
from chunkplan.engine.optimizer.state_transfer import (
    WHOLE,
    BlockKey,
    ChunkStates,
    Lane,
    States,
    StateTransfer,
    lane_for,
)
from chunkplan.engine.spec import Master, Optimizer, ResolvedTraining, StateDtype
from chunkplan.engine.stream.schedule import Visit


@dataclass(frozen=True, slots=True)
class OptimizerConfig(HyperParameters):
    """Which rule, its hyper-parameters, and what becomes of its states."""

    rule: Optimizer = Optimizer.ADAMW
    max_grad_norm: float | None = 1.0
    states: Literal["keep", "reset"] = "keep"
    state_dtype: StateDtype = StateDtype.FP32
    master: Master = Master.NONE
    seed: int = 0
    """Decides stochastic rounding."""

    @classmethod
    def of(
        cls,
        training: ResolvedTraining,
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        seed: int = 0,
    ) -> Self:
        """Return what a training spec asks of the optimizer; betas are the rule's usual ones unless given."""
        schedule = training.schedule
        beta1, beta2 = betas or DEFAULT_BETAS[training.optimizer]
        return cls(
            weight_decay=weight_decay,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            rule=training.optimizer,
            max_grad_norm=training.max_grad_norm,
            states=schedule.states,
            state_dtype=schedule.state_dtype,
            master=schedule.master,
            seed=seed,
        )

    def layout(self, weight: Tensor) -> StateLayout:
        """The states of a weight."""
        master = Master.NONE if weight.dtype == torch.float32 else self.master
        return StateLayout(self.rule, self.state_dtype, self.states, master)


class ChunkOptimizer:
    """Updates one chunk at a time; see the module's docstring.

    Args:
        config: what to do.
        lane: where states travel; default: what suits the weights' device.
        rate_factor: a parameter's learning rate over the one of the update, by its name.
    """

    def __init__(
        self, config: OptimizerConfig, lane: Lane | None = None, rate_factor: Callable[[str], float] | None = None
    ) -> None:
        self.config = config
        self._rate_factor = rate_factor or (lambda _: 1.0)
        self.chunks: dict[int, ChunkStates] = {}
        self._lane = lane
        self._visit: Visit | None = None
        self._learning_rate = 0.0
        self.loss_scale = 1.0
        self._noise = Noise(config.seed)

    def update(
        self, active: list[ActiveSlice], visit: Visit, learning_rate: float, loss_scale: float = 1.0
    ) -> float | None:
        """Clip, update every slice, release its gradient; return the chunk's gradient norm, None without
        clipping.

        Gradients are ``loss_scale`` times too large; the norm is not.
        """
        norm = clip_(active, self.config.max_grad_norm, loss_scale)
        self.loss_scale = loss_scale
        self.begin(visit, learning_rate)
        with_gradient = [(i, piece) for i, piece in enumerate(active) if piece.tensor.grad is not None]
        # States that pass through travel from one slice to the next without a pause, where copies run beside
        # updates.
        is_shared = bool(with_gradient) and visit.is_first and visit.is_last and self.lane(active[0]).ahead > 0
        transfer = self.transfer(with_gradient) if is_shared else None
        for ordinal, piece in with_gradient:
            self.update_slice(ordinal, piece, transfer)
        if transfer is not None:
            transfer.close()
        self.finish(active)
        return norm

    def skip(self, active: list[ActiveSlice], visit: Visit) -> None:
        """Release the gradients without an update: the step count stays, states leave when they must."""
        self.begin(visit, 0.0)
        self.chunks[visit.chunk_index].num_updates -= 1
        for piece in active:
            if piece.tensor.grad is not None:
                piece.release_gradient()
        self.finish(active)

    def begin(self, visit: Visit, learning_rate: float) -> None:
        """Count an update of the visit's chunk, whose slices are updated next, in any order."""
        self._visit, self._learning_rate = visit, learning_rate
        states = self.chunks.setdefault(visit.chunk_index, ChunkStates())
        if visit.is_first and self.config.states == "reset":
            states.num_updates = 0
            states.device.clear()
        states.num_updates += 1
        states.last_update = visit.update

    def transfer(self, pieces: list[tuple[int, ActiveSlice]]) -> StateTransfer:
        """For the states of the slices (with their ordinals) in the update that has begun."""
        assert self._visit is not None
        wanted: dict[BlockKey, dict[str, StateTensor]] = {}
        for ordinal, piece in pieces:
            layout, shape = self.config.layout(piece.tensor), (piece.tensor.numel(), piece.num_columns)
            wanted[ordinal, WHOLE] = layout.of_slice(*shape)
            wanted |= {(ordinal, begin): layout.of_block(size) for begin, size in layout.blocks(*shape)}
        first = pieces[0][1]
        return StateTransfer(
            self.chunks[self._visit.chunk_index],
            self.config.layout(first.tensor),
            self.lane(first),
            wanted,
            first.tensor.device,
            passes_through=self._visit.is_first and self._visit.is_last,
        )

    def update_slice(self, ordinal: int, piece: ActiveSlice, transfer: StateTransfer | None = None) -> None:
        """Update the slice's weights block by block, then release its gradient.

        Args:
            ordinal: of the slice within the chunk.
            piece: the slice; nothing happens when it has no gradient.
            transfer: by which its states come and go; default: one of its own.
        """
        gradient = piece.tensor.grad
        if gradient is None:
            return
        assert self._visit is not None
        own = transfer or self.transfer([(ordinal, piece)])
        rate = self._learning_rate * self._rate_factor(piece.name)
        _SliceUpdate(self, ordinal, piece, gradient, own, self._visit, rate).run()
        if transfer is None:
            own.close()
        del gradient
        piece.release_gradient()

    def finish(self, active: list[ActiveSlice]) -> None:
        """End an update: the states of slices without a gradient leave with the visit's last update."""
        assert self._visit is not None
        visit, self._visit = self._visit, None
        states = self.chunks[visit.chunk_index]
        if not visit.is_last or not states.device:
            return
        layout, device = self.config.layout(active[0].tensor), active[0].tensor.device
        transfer = StateTransfer(states, layout, self.lane(active[0]), {}, device, passes_through=False)
        for key in list(states.device):
            transfer.leave(key)
        transfer.close()

    @property
    def is_updating(self) -> bool:
        """Between :meth:`begin` and :meth:`finish`."""
        return self._visit is not None

    def lane(self, piece: ActiveSlice) -> Lane:
        """Where states travel."""
        if self._lane is None:
            self._lane = lane_for(piece.tensor.device)
        return self._lane

    def settle(self) -> None:
        """Return when all states that left are home: call it before reading them there."""
        if self._lane is not None:
            self._lane.settle()

    def noise(self, weight: Tensor, visit: Visit, key: BlockKey) -> Generator | None:
        """What stochastic rounding draws from in a block."""
        return self._noise.at(weight.device, visit.update, *key)


class _SliceUpdate:
    """One update of one slice."""

    def __init__(
        self,
        optimizer: ChunkOptimizer,
        ordinal: int,
        piece: ActiveSlice,
        gradient: Tensor,
        transfer: StateTransfer,
        visit: Visit,
        rate: float,
    ) -> None:
        self._optimizer, self._config = optimizer, optimizer.config
        self._states = optimizer.chunks[visit.chunk_index]
        self._visit, self._ordinal, self._rate = visit, ordinal, rate
        self._weight, self._gradient = piece.tensor.detach(), gradient
        self._num_columns = piece.num_columns
        self._layout, self._transfer = self._config.layout(self._weight), transfer

    @torch.no_grad()
    def run(self) -> None:
        """Block by block."""
        factored = self._factored() if self._config.rule is Optimizer.ADAFACTOR else None
        for begin, numel in self._layout.blocks(self._weight.numel(), self._num_columns):
            key = self._ordinal, begin
            self._update_block(key, numel, self._transfer.take(key), factored)
            if self._visit.is_last:
                self._transfer.leave(key)
        if factored is not None and self._visit.is_last:
            self._transfer.leave((self._ordinal, WHOLE))

    def _factored(self) -> FactoredUpdate:
        """Adafactor's update, from second moments of the whole slice."""
        factors = self._transfer.take((self._ordinal, WHOLE))
        matrix = self._gradient.view(-1, self._num_columns)
        decay = 1.0 - self._states.num_updates**-0.8
        row, column = factors["row"].unsqueeze(1), factors["column"].unsqueeze(0)
        return FactoredUpdate(matrix, row, column, decay, 1.0, self._optimizer.loss_scale)

    def _update_block(self, key: BlockKey, numel: int, here: States, factored: FactoredUpdate | None) -> None:
        begin = key[1]
        weight, gradient = self._weight[begin : begin + numel], self._gradient[begin : begin + numel]
        if self._layout.master is Master.FP32 and "master" not in here:
            here["master"] = weight.float()
            self._states.device[key] = here
        exact = _exact(weight, here)
        noise = self._optimizer.noise(weight, self._visit, key)
        if factored is not None:
            first_row = begin // self._num_columns
            update = factored.rows(slice(first_row, first_row + numel // self._num_columns))
            decay_(exact, self._rate, self._config)
            exact.sub_(update.mul_(self._rate).view(-1))
            del update
        else:
            moments = _moments(here, self._layout)
            rule, count = RULES[self._config.rule], self._states.num_updates
            gradient = gradient.float()
            if self._optimizer.loss_scale != 1.0:
                gradient.div_(self._optimizer.loss_scale)
            rule(exact, gradient, [m[:numel] for m in moments], count, self._rate, self._config)
            _store_moments(moments, here, self._layout, noise)
            del moments
        _write_back(exact, weight, here, noise)


def _moments(here: States, layout: StateLayout) -> list[Tensor]:
    """Return a block's moments in fp32: the stored tensors, or new ones (8-bit ones fill their last 256)."""
    found = []
    for i, is_signed in enumerate(MOMENT_SIGNS[layout.rule]):
        stored = here[f"moment{i}"]
        if layout.state_dtype is StateDtype.INT8:
            found.append(dequantise(stored, here[f"scale{i}"], is_signed))
        else:
            found.append(stored.float())
    return found


def _store_moments(moments: list[Tensor], here: States, layout: StateLayout, noise: Generator | None) -> None:
    """Inverse of :func:`_moments`; overwrites ``moments``."""
    for i, (moment, is_signed) in enumerate(zip(moments, MOMENT_SIGNS[layout.rule], strict=True)):
        stored = here[f"moment{i}"]
        if layout.state_dtype is StateDtype.INT8:
            quantise(moment, stored, here[f"scale{i}"], is_signed, noise)
        elif layout.state_dtype is StateDtype.BF16:
            stored.copy_(stochastic_round_(moment, noise))


def _exact(weight: Tensor, here: States) -> Tensor:
    """The fp32 weights to update: the weights themselves, the master, or a new tensor."""
    if "master" in here:
        return here["master"]
    if "residual" in here:
        return join(weight, here["residual"])
    return weight.float()


def _write_back(exact: Tensor, weight: Tensor, here: States, noise: Generator | None) -> None:
    if weight.dtype == torch.float32:
        return
    if "residual" in here:
        split(exact, weight, here["residual"])
    elif "master" in here:
        weight.copy_(exact)
    else:
        weight.copy_(stochastic_round_(exact, noise, weight.dtype))


def clip_(active: list[ActiveSlice], max_norm: float | None, loss_scale: float = 1.0) -> float | None:
    """Scale the active gradients to a total norm of at most ``max_norm``; return the norm before.

    Both norms are those of the gradients divided by ``loss_scale``.
    """
    gradients = [piece.tensor.grad for piece in active if piece.tensor.grad is not None]
    if max_norm is None or not gradients:
        return None
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    total = torch.linalg.vector_norm(torch.stack(norms))
    if loss_scale != 1.0:
        total.div_(loss_scale)
    factor = (max_norm / (total + 1e-6)).clamp_(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
    return 0.0 if total.device.type == "meta" else float(total)
