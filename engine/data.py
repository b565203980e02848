"""Training data: from a file to batches of token ids. Imports no torch until tensors are asked for.

    splits = load_dataset("chats.jsonl", "auto", tokenizer, seq_len=1024, eval_fraction=0.05, seed=0)
    batches = Batches(splits.train, micro_batch_size=8, seed=0)
    inputs = collate(batches.batch(17), pad_token_id=tokenizer.pad_token_id, seq_len=1024)

Row formats are described in engine.rows, what is trained in engine.tokenize.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import InputError
from engine.files import sha256_file
from engine.readers import FIELD
from engine.rows import FormatChoice, RowReader
from engine.tokenize import IGNORE_INDEX, Encoder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORE_INDEX",
    "Batches",
    "DatasetInfo",
    "DatasetSplits",
    "DatasetStats",
    "Example",
    "check_dataset",
    "collate",
    "load_dataset",
]

LENGTH_MULTIPLE = 64
"""Batches are padded to a multiple of this many tokens, so that few distinct shapes occur."""


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What a dataset is, without a tokenizer."""

    num_rows: int
    format: FormatChoice
    sha256: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row, tokenized and truncated; ``labels[i]`` is ``input_ids[i]`` where trained, else -100 (not shifted)."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class DatasetStats:
    """What became of the rows: ``num_rows`` = train + eval + skipped."""

    num_rows: int
    num_train_rows: int
    num_eval_rows: int
    num_truncated_rows: int
    """Rows longer than ``seq_len``, skipped ones included."""
    num_skipped_rows: int
    """Rows without a trained token within ``seq_len``."""
    sha256: str


@dataclass(frozen=True, slots=True)
class DatasetSplits:
    """Training and held-out examples of one dataset."""

    train: list[Example]
    evaluation: list[Example]
    stats: DatasetStats


def check_dataset(path: str | Path, format: FormatChoice = "auto") -> DatasetInfo:
    """Read a dataset from end to end and check every row.

    Raises:
        InputError: for ``dataset.path``; names the line for whatever is wrong in one.
    """
    reader = RowReader(path, format)
    num_rows = sum(1 for _ in reader)
    return DatasetInfo(num_rows, reader.format, sha256_file(Path(path)))


def load_dataset(
    path: str | Path,
    format: FormatChoice,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    eval_fraction: float,
    seed: int,
) -> DatasetSplits:
    """Tokenize a dataset and split it.

    Args:
        path: JSONL file.
        format: a format's name, or ``auto``.
        tokenizer: a fast tokenizer.
        seq_len: longer rows are cut at this many tokens.
        eval_fraction: share of the rows that are held out, from the end of a shuffle seeded with ``seed``; above zero,
            at least one row is held out and at least one is trained.
        seed: decides the split.

    Raises:
        InputError: the file or a row cannot be used, or nothing is left to train.
    """
    reader = RowReader(path, format)
    encoder = Encoder(tokenizer)
    examples: list[Example] = []
    num_rows = num_truncated = 0
    for row in reader:
        num_rows += 1
        try:
            tokens = encoder.encode(row.content)
        except ValueError as error:
            raise InputError(FIELD, f"{row.place}: {error}") from error
        num_truncated += len(tokens.input_ids) > seq_len
        example = Example(tokens.input_ids[:seq_len], tokens.labels[:seq_len])
        if _is_trained(example):
            examples.append(example)
    train, evaluation = _split(examples, eval_fraction, seed)
    if not train:
        raise InputError(FIELD, f"none of the {num_rows} rows has a token to train within seq_len {seq_len}")
    skipped = num_rows - len(examples)
    stats = DatasetStats(num_rows, len(train), len(evaluation), num_truncated, skipped, sha256_file(Path(path)))
    return DatasetSplits(train, evaluation, stats)


def _is_trained(example: Example) -> bool:
    # The first token has no context to be predicted from: its label never counts.
    return any(label != IGNORE_INDEX for label in example.labels[1:])


def _split(examples: list[Example], eval_fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    shuffled = examples.copy()
    random.Random(f"split {seed}").shuffle(shuffled)
    num_eval = round(len(shuffled) * eval_fraction)
    if eval_fraction > 0:
        num_eval = min(max(num_eval, 1), len(shuffled) - 1)
    num_train = len(shuffled) - max(num_eval, 0)
    return shuffled[:num_train], shuffled[num_train:]


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
        return -(-len(self.examples) // self.micro_batch_size)

    def batch(self, index: int) -> list[Example]:
        """The examples of batch ``index`` (from 0)."""
        first = index * self.micro_batch_size
        return [self._example(position) for position in range(first, first + self.micro_batch_size)]

    def _example(self, position: int) -> Example:
        epoch, offset = divmod(position, len(self.examples))
        return self.examples[self._permutation(epoch)[offset]]

    def _permute(self, epoch: int) -> list[int]:
        order = list(range(len(self.examples)))
        random.Random(f"epoch {self.seed} {epoch}").shuffle(order)
        return order


def collate(examples: Sequence[Example], pad_token_id: int, seq_len: int) -> dict[str, Tensor]:
    """Tensors of one micro-batch: ``input_ids`` and ``labels``, int64, [B, S].

    Padded on the right to the longest example, rounded up to a multiple of 64 and capped at ``seq_len``. There is no
    attention mask on purpose: under causal attention no real token ever sees the padding to its right, and
    the padding's own labels are -100.

    Args:
        examples: none longer than ``seq_len``.
        pad_token_id: any id of the vocabulary.
        seq_len: the longest batch allowed.
    """
    import torch

    longest = max(len(example.input_ids) for example in examples)
    width = min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, seq_len)
    input_ids = torch.full((len(examples), width), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(examples), width), IGNORE_INDEX, dtype=torch.int64)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
    return {"input_ids": input_ids, "labels": labels}
