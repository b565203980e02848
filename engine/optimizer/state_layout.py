"""What an optimizer keeps beside a slice's weights: which tensors, how large, where. Imports no torch.

The optimizer makes its tensors by this layout, and the planner adds up their sizes by it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from chunkplan.engine.arithmetic import ceil_div
from chunkplan.engine.spec import (
    Master,
    Optimizer,
    Precision,
    ResolvedSchedule,
    StateDtype,
    TrainingSpec,
)

BLOCK_NUMEL = 4 * 2**20
"""Elements updated at a time: AdamW's fp32 states of a block take 32 MiB, a bf16 weight's temporaries 48 MiB.
"""
SCALED_NUMEL = 256
"""Elements of an 8-bit state that share a scale."""

ITEMSIZES = {"float32": 4, "bfloat16": 2, "int16": 2, "uint8": 1}
_STORED = {StateDtype.FP32: "float32", StateDtype.BF16: "bfloat16", StateDtype.INT8: "uint8"}

MOMENT_SIGNS: dict[Optimizer, tuple[bool, ...]] = {
    Optimizer.ADAMW: (True, False),
    Optimizer.ADAMW8BIT: (True, False),
    Optimizer.ADAFACTOR: (),
    Optimizer.LION: (True,),
    Optimizer.SGD: (True,),
    Optimizer.ADAGRAD: (False,),
    Optimizer.RMSPROP: (False,),
}
"""Per state tensor of the weights' size: can it be negative?"""


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor of states, flat: its elements and the name of its torch data type."""

    numel: int
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.numel * ITEMSIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class StateLayout:
    """The states of one optimizer under one schedule, for weights of one precision."""

    rule: Optimizer
    state_dtype: StateDtype
    states: Literal["keep", "reset"]
    master: Master
    """``none`` where the weights are fp32."""

    @staticmethod
    def of(training: TrainingSpec, schedule: ResolvedSchedule) -> StateLayout:
        """What a spec asks for."""
        master = Master.NONE if training.precision is Precision.FP32 else schedule.master
        return StateLayout(training.optimizer, schedule.state_dtype, schedule.states, master)

    def blocks(self, numel: int, num_columns: int) -> list[tuple[int, int]]:
        """Return (first element, number of elements) of the parts in which a slice is updated, the last
        smaller.

        Args:
            numel: elements of the slice.
            num_columns: elements of its last dimension, 1 for a vector.
        """
        step = BLOCK_NUMEL
        if self.rule is Optimizer.ADAFACTOR:
            step = max(BLOCK_NUMEL // num_columns, 1) * num_columns
        return [(begin, min(step, numel - begin)) for begin in range(0, numel, step)]

    def of_block(self, numel: int) -> dict[str, StateTensor]:
        """The states of one block by name, without the fp32 master, which never travels."""
        tensors: dict[str, StateTensor] = {}
        for i in range(len(MOMENT_SIGNS[self.rule])):
            if self.state_dtype is StateDtype.INT8:
                num_scales = ceil_div(numel, SCALED_NUMEL)
                tensors[f"moment{i}"] = StateTensor(num_scales * SCALED_NUMEL, "uint8")
                tensors[f"scale{i}"] = StateTensor(num_scales, "float32")
            else:
                tensors[f"moment{i}"] = StateTensor(numel, _STORED[self.state_dtype])
        if self.master is Master.RESIDUAL:
            tensors["residual"] = StateTensor(numel, "int16")
        return tensors

    def of_slice(self, numel: int, num_columns: int) -> dict[str, StateTensor]:
        """The states that belong to no block: Adafactor's second moments of rows and columns."""
        if self.rule is not Optimizer.ADAFACTOR:
            return {}
        return {"row": StateTensor(numel // num_columns, "float32"), "column": StateTensor(num_columns, "float32")}

    def wanted(self, slices: list[tuple[int, int]]) -> list[dict[str, StateTensor]]:
        """The states of all blocks of slices of (``numel``, ``num_columns``)."""
        return [self.of_block(size) for piece in slices for _, size in self.blocks(*piece)]

    def stays(self, name: str) -> bool:
        """Does a state live in host memory between visits?"""
        return name == "residual" or (name != "master" and self.states == "keep")

    def device_bytes(self, numel: int, num_columns: int) -> list[int]:
        """Size of every tensor that belongs to a slice while all of its states are on the device."""
        tensors = list(self.of_slice(numel, num_columns).values())
        for _, size in self.blocks(numel, num_columns):
            tensors += self.of_block(size).values()
            if self.master is Master.FP32:
                tensors.append(StateTensor(size, "float32"))
        return [tensor.num_bytes for tensor in tensors]

    def host_bytes(self, numel: int, num_columns: int) -> int:
        """What a slice leaves in host memory between visits."""
        sizes = Counter(size for _, size in self.blocks(numel, num_columns))
        of_blocks = sum(self._staying_bytes(self.of_block(size)) * count for size, count in sizes.items())
        return self._staying_bytes(self.of_slice(numel, num_columns)) + of_blocks

    def _staying_bytes(self, tensors: dict[str, StateTensor]) -> int:
        return sum(tensor.num_bytes for name, tensor in tensors.items() if self.stays(name))


def largest_tensors(blocks: list[dict[str, StateTensor]]) -> dict[str, StateTensor]:
    """A buffer that takes the states of any of the blocks."""
    largest: dict[str, StateTensor] = {}
    for tensors in blocks:
        for name, tensor in tensors.items():
            if name not in largest or largest[name].numel < tensor.numel:
                largest[name] = tensor
    return largest
