"""The schedule: which chunk is active when, and what becomes of its optimizer states."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from chunkplan.engine.spec.base import SpecModel
from chunkplan.engine.spec.choices import Master, Optimizer, Order, StateDtype

DEFAULT_NUM_CHUNKS = 32


class ScheduleSpec(SpecModel):
    """Which chunk is active at which optimizer update, and where its optimizer states live.

    This is a schedule as it is asked for: a field that is None is decided by the rest of the training spec,
    see :class:`ResolvedSchedule`.
    """

    num_chunks: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Number of chunks; default 32, or 1 with a method that has one chunk."""
    order: Order = Order.DESCENDING
    """In which order a cycle visits the chunks: descending, ascending or random."""
    switch_every: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """Optimizer updates per visit of a chunk."""
    states: Literal["keep", "reset"] = "keep"
    """Optimizer states between visits: ``keep`` in host memory, or ``reset`` to zero every time."""
    state_dtype: StateDtype | None = None
    """How states are stored: fp32, bf16 or int8 (rounded stochastically); default fp32, int8 with
    adamw8bit.
    """
    master: Master = Master.NONE
    """What bf16 weights lack: ``none``, rounded stochastically; an ``fp32`` copy while a chunk is visited; or
    its low 16 bits kept on the host for ever, ``residual``.
    """
    expansion: Literal["none", "factored"] = "none"
    """``factored``: parameters above the active chunk take a step too, in backward, with factored moments."""

    def resolved(self, optimizer: Optimizer, *, has_one_chunk: bool) -> ResolvedSchedule:
        """Return the schedule with everything decided.

        Args:
            optimizer: decides how states are stored where nothing is asked for.
            has_one_chunk: the method trains everything at once.
        """
        num_chunks, state_dtype = self.num_chunks, self.state_dtype
        if num_chunks is None:
            num_chunks = 1 if has_one_chunk else DEFAULT_NUM_CHUNKS
        if state_dtype is None:
            state_dtype = StateDtype.INT8 if optimizer is Optimizer.ADAMW8BIT else StateDtype.FP32
        return ResolvedSchedule.model_validate(
            dict(self) | {"num_chunks": num_chunks, "state_dtype": state_dtype}, strict=False
        )


class ResolvedSchedule(ScheduleSpec):
    """A schedule that can run: nothing in it is left to be decided."""

    num_chunks: Annotated[int, Field(ge=1, le=1_000_000)] = DEFAULT_NUM_CHUNKS
    """Number of chunks."""
    state_dtype: StateDtype = StateDtype.FP32
    """How states are stored; they are rounded stochastically to bf16 and int8."""


def default_schedule(optimizer: Optimizer, num_chunks: int) -> ResolvedSchedule:
    """Return the schedule that asks for nothing but its number of chunks."""
    return ScheduleSpec(num_chunks=num_chunks).resolved(optimizer, has_one_chunk=False)
