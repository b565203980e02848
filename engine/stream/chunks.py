"""The parameter stream and its partition into chunks, as pure data.

The stream is the model's unique parameters in ``named_parameters()`` order, seen as one sequence of bytes. A
chunk is a contiguous range of it. Cuts fall on rows (dimension 0) of tensors with two or more dimensions;
one-dimensional tensors (norms, biases) are never cut. Every element of every parameter lies in exactly one
chunk. Imports no torch.

Source: ChunkFT, arXiv 2605.21177 (byte stream, balanced by bytes); the rule about rows is ours
(docs/decisions/0001-cuts.md).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from chunkplan.engine.errors import InputError


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return (rows, columns) of a parameter as one matrix: columns are its last dimension, one for a vector.

    Second moments are factored that way, and slices are updated in whole rows of it.
    """
    num_columns = shape[-1] if len(shape) > 1 else 1
    return prod(shape) // num_columns, num_columns


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """Name, shape and element size of one parameter of the stream."""

    name: str
    shape: tuple[int, ...]
    itemsize: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.itemsize

    @property
    def num_rows(self) -> int:
        """Units that a cut may separate: rows of a matrix, experts of a 3-D weight; one for a vector."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def num_columns(self) -> int:
        """Length of the last dimension; 1 for a vector."""
        return matrix_shape(self.shape)[1]

    @property
    def row_numel(self) -> int:
        """Elements of one row."""
        return self.numel // self.num_rows


@dataclass(frozen=True, slots=True)
class Slice:
    """The flat element range [start, stop) of the parameter at ``index`` of the stream."""

    index: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Chunk:
    """A contiguous range of the stream: whole tensors, with at most the first and the last one cut."""

    index: int
    slices: tuple[Slice, ...]

    @property
    def num_parameters(self) -> int:
        """Number of elements over all slices."""
        return sum(piece.numel for piece in self.slices)


def partition(parameters: Sequence[ParameterInfo], num_chunks: int) -> list[Chunk]:
    """Cut the stream into ``num_chunks`` non-empty chunks whose sizes in bytes are as equal as rows allow.

    Raises:
        InputError: ``num_chunks`` is not between 1 and the number of rows of the stream.
    """
    cuts_after = list(accumulate((p.num_rows for p in parameters), initial=0))
    bytes_after = list(accumulate((p.num_bytes for p in parameters), initial=0))
    num_units = cuts_after[-1]
    if not 1 <= num_chunks <= num_units:
        raise InputError(
            "training.schedule.num_chunks",
            f"must be between 1 and {num_units}, the number of rows of this model's parameters",
        )

    def nearest_unit(target_bytes: float) -> int:
        index = min(bisect_right(bytes_after, target_bytes) - 1, len(parameters) - 1)
        row_bytes = parameters[index].num_bytes / parameters[index].num_rows
        return cuts_after[index] + round((target_bytes - bytes_after[index]) / row_bytes)

    bounds = [0]
    for i in range(1, num_chunks):
        unit = nearest_unit(bytes_after[-1] * i / num_chunks)
        bounds.append(min(max(unit, bounds[-1] + 1), num_units - (num_chunks - i)))
    bounds.append(num_units)
    return [Chunk(i, _slices(parameters, cuts_after, bounds[i], bounds[i + 1])) for i in range(num_chunks)]


def _slices(parameters: Sequence[ParameterInfo], cuts_after: list[int], begin: int, end: int) -> tuple[Slice, ...]:
    """Slices of the stream's units [begin, end)."""
    slices = []
    index = bisect_right(cuts_after, begin) - 1
    while index < len(parameters) and cuts_after[index] < end:
        info, first = parameters[index], cuts_after[index]
        start_row, stop_row = max(begin - first, 0), min(end - first, info.num_rows)
        if stop_row > start_row:
            slices.append(Slice(index, start_row * info.row_numel, stop_row * info.row_numel))
        index += 1
    return tuple(slices)
