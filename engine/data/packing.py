"""Best-fit-decreasing packing: many short rows share one sequence. Imports no torch.

The longest row goes first, each into the sequence that it leaves the least room in. Rows of one length are
placed at once, so the work grows with the distinct lengths, not with the rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chunkplan.engine.arithmetic import ceil_div


class Packing(NamedTuple):
    """Sequence i holds the rows ``members[bounds[i] : bounds[i + 1]]``, longest first."""

    members: NDArray[np.uint32]
    bounds: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.bounds) - 1


def pack(lengths: NDArray[np.int64], capacity: int) -> Packing:
    """Distribute rows over as few sequences as the rule finds, the same for the same lengths.

    Args:
        lengths: tokens of each row, from 1 to ``capacity``; without rows there are no sequences.
        capacity: tokens of a sequence.
    """
    by_length = np.argsort(-lengths, kind="stable")
    ordered = lengths[by_length]
    place = np.empty(len(lengths), dtype=np.int64)
    room = _Room(capacity)
    starts = np.flatnonzero(np.diff(ordered, prepend=capacity + 1))
    stops = np.append(starts, len(ordered))[1:]
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        length = int(ordered[start])
        while start < stop:
            sequences, each = room.best(length, stop - start)
            count = min(stop - start, len(sequences) * each)
            place[start : start + count] = np.repeat(sequences, each)[:count]
            start += count
    bounds = np.concatenate(([0], np.cumsum(np.bincount(place, minlength=room.num_sequences))))
    members = by_length[np.argsort(place, kind="stable")]
    return Packing(members.astype(np.uint32), bounds.astype(np.int64))


class _Room:
    """Sequences by the room that they have left."""

    def __init__(self, capacity: int) -> None:
        self.num_sequences = 0
        self._capacity = capacity
        self._free: dict[int, NDArray[np.int64]] = {}
        self._sizes = 0
        """Bit i is set where sequences have room for exactly i tokens."""

    def best(self, length: int, count: int) -> tuple[NDArray[np.int64], int]:
        """Return the sequences that rows of one length fill best, and how many rows each takes, but for the
        last.
        """
        fitting = self._sizes >> length
        size = length + (fitting & -fitting).bit_length() - 1 if fitting else self._capacity
        each = size // length
        needed = ceil_div(count, each)
        if fitting:
            available = self._free.pop(size)
            self._sizes ^= 1 << size
            chosen, rest = available[:needed], available[needed:]
            self._add(rest, size)
        else:
            chosen = np.arange(self.num_sequences, self.num_sequences + needed)
            self.num_sequences += needed
        last = min(each, count - (len(chosen) - 1) * each)
        self._add(chosen[:-1], size - each * length)
        self._add(chosen[-1:], size - last * length)
        return chosen, each

    def _add(self, sequences: NDArray[np.int64], size: int) -> None:
        if not len(sequences) or not size:
            return
        known = self._free.get(size)
        self._free[size] = sequences if known is None else np.concatenate((known, sequences))
        self._sizes |= 1 << size
