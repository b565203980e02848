"""Batches: which examples they hold, and their tensors. Imports torch only to make these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray

from chunkplan.engine.arithmetic import ceil_div, round_up
from chunkplan.engine.data.packing import Packing, pack
from chunkplan.engine.data.token_store import TokenStore, permutation
from chunkplan.engine.data.tokens import IGNORE_INDEX, Tokens

if TYPE_CHECKING:
    from torch import Tensor

LENGTH_MULTIPLE = 64
"""Batches are padded to a multiple of this many tokens, so that few distinct shapes occur."""


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence to train on; ``labels[i]`` is ``input_ids[i]`` where trained, else -100 (not shifted)."""

    input_ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...] = ()
    """Tokens of each row, where several rows share the sequence."""


class Examples(Sequence[Example]):
    """Some rows of a store as examples: each row alone, or several packed into one.

    Args:
        store: the tokenized rows.
        rows: which of them, in which order.
        capacity: tokens of a sequence that rows are packed into; None: every row is an example.
    """

    def __init__(self, store: TokenStore, rows: NDArray[np.uint32], capacity: int | None) -> None:
        self._store = store
        lengths = store.lengths[rows]
        self.num_tokens = int(lengths.sum())
        """Number of tokens in all rows."""
        self._packing: Packing | None = None
        self._rows = rows
        if capacity is not None:
            self._packing = pack(lengths, capacity)
            self._rows = rows[self._packing.members]

    def __len__(self) -> int:
        return len(self._rows) if self._packing is None else len(self._packing)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        if self._packing is None:
            return Example(*self._store[int(self._rows[index])])
        first, last = self._packing.bounds[index : index + 2].tolist()
        return joined([self._store[row] for row in self._rows[first:last].tolist()])


def joined(rows: Sequence[Tokens]) -> Example:
    """Return rows one after the other, none of whose first tokens is trained: it follows another
    row's end.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for row in rows:
        input_ids += row.input_ids
        labels += [IGNORE_INDEX, *row.labels[1:]]
    return Example(input_ids, labels, tuple(len(row.input_ids) for row in rows))


class Batches:
    """Endless micro-batches over ``examples``; which examples a batch holds depends on its index alone.

    Every epoch is a fresh permutation. Epochs follow one another without a gap: the last batch of an epoch is
    filled up with the first examples of the next. So the data position of a checkpoint is one integer.

    Args:
        examples: at least one.
        micro_batch_size: examples per batch.
        seed: decides the permutations.
    """

    def __init__(self, examples: Sequence[Example], micro_batch_size: int, seed: int) -> None:
        if not examples:
            raise ValueError("no examples to make batches of")
        self.examples = examples
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self._permutation = lru_cache(maxsize=2)(self._permute)

    @property
    def num_batches_per_epoch(self) -> int:
        """Batches until every example has been seen once."""
        return ceil_div(len(self.examples), self.micro_batch_size)

    def batch(self, index: int) -> list[Example]:
        """The examples of batch ``index`` (from 0)."""
        first = index * self.micro_batch_size
        return [self._example(position) for position in range(first, first + self.micro_batch_size)]

    def _example(self, position: int) -> Example:
        epoch, offset = divmod(position, len(self.examples))
        return self.examples[int(self._permutation(epoch)[offset])]

    def _permute(self, epoch: int) -> NDArray[np.uint32]:
        return permutation(len(self.examples), "epoch", self.seed, epoch)


def collate(
    examples: Sequence[Example], pad_token_id: int, seq_len: int, *, packing: bool = False
) -> dict[str, Tensor]:
    """Return a micro-batch: ``input_ids`` and ``labels``, int64 [B, S]; with packing ``position_ids`` too.

    Padded on the right to the longest example, rounded up to a multiple of 64 and capped at ``seq_len``.
    There is no attention mask on purpose: under causal attention no real token ever sees the padding to its
    right, and the padding's own labels are -100. Positions start from 0 at every row of a packed sequence,
    and at its padding.

    Args:
        examples: none longer than ``seq_len``.
        pad_token_id: any id of the vocabulary.
        seq_len: the longest batch allowed.
        packing: the examples are packed sequences.
    """
    import torch

    longest = max(len(example.input_ids) for example in examples)
    width = min(round_up(longest, LENGTH_MULTIPLE), seq_len)
    input_ids = torch.full((len(examples), width), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(examples), width), IGNORE_INDEX, dtype=torch.int64)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
    if not packing:
        return {"input_ids": input_ids, "labels": labels}
    position_ids = torch.empty((len(examples), width), dtype=torch.int64)
    for row, example in enumerate(examples):
        lengths = [*example.lengths, width - len(example.input_ids)]
        torch.cat([torch.arange(length) for length in lengths], out=position_ids[row])
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
