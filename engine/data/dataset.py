"""Training data: from a file to batches of token ids. Imports no torch until tensors are asked for.

    splits = load_dataset("chats.jsonl", "auto", tokenizer, seq_len=1024, eval_fraction=0.05, seed=0)
    batches = Batches(splits.train, micro_batch_size=8, seed=0)
    inputs = collate(batches.batch(17), pad_token_id=tokenizer.pad_token_id, seq_len=1024)

Files are described in chunkplan.engine.data.readers, row formats in chunkplan.engine.data.rows, what is
trained in chunkplan.engine.data.tokens. Rows are read, tokenized and written to a store on disk one batch
after the other: no step holds the set in memory.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from chunkplan.engine.data.batches import Examples
from chunkplan.engine.data.readers import FIELD
from chunkplan.engine.data.rows import FormatChoice, RawText, Row, RowReader
from chunkplan.engine.data.token_store import StoreWriter, TokenStore, permutation
from chunkplan.engine.data.tokens import IGNORE_INDEX, Encoder, Tokens
from chunkplan.engine.errors import InputError
from chunkplan.engine.files import sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VALIDATION_FIELD = "dataset.validation_path"
_BATCH_ROWS, _BATCH_CHARACTERS = 256, 2**20


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What a dataset is, without a tokenizer."""

    num_rows: int
    """Rows of the file; of a text, its blocks."""
    format: FormatChoice


@dataclass(frozen=True, slots=True)
class DatasetStats:
    """Says what became of the rows (train + eval + skipped); each piece of a text counts as one."""

    num_rows: int
    num_train_rows: int
    num_eval_rows: int
    num_truncated_rows: int
    """Rows longer than ``seq_len``, skipped ones included."""
    num_skipped_rows: int
    """Rows without a trained token within ``seq_len``."""
    num_train_tokens: int
    """Number of tokens in the rows to train on, as far as they are used."""
    num_packed_sequences: int | None
    """Sequences of ``seq_len`` tokens that the rows to train on were packed into; None without packing."""
    packing_density: float | None
    """Share of these sequences' tokens that are rows' tokens."""
    sha256: str


@dataclass(frozen=True, slots=True)
class DatasetSplits:
    """Training and held-out examples of one dataset."""

    train: Examples
    evaluation: Examples
    stats: DatasetStats


def check_dataset(path: str | Path, format: FormatChoice = "auto") -> DatasetInfo:
    """Read a dataset from end to end and check every row.

    Raises:
        InputError: for ``dataset.path``; names the line or row for whatever is wrong in one.
    """
    reader = RowReader(path, format)
    num_rows = sum(1 for _ in reader)
    return DatasetInfo(num_rows, reader.format)


def load_dataset(
    path: str | Path,
    format: FormatChoice,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    eval_fraction: float,
    seed: int,
    *,
    packing: bool = False,
    folder: Path | None = None,
) -> DatasetSplits:
    """Tokenize a dataset and split it.

    Args:
        path: a file that chunkplan.engine.data.readers knows.
        format: a format's name, or ``auto``.
        tokenizer: a fast tokenizer.
        seq_len: longer rows are cut off at this many tokens, texts are cut into pieces of it.
        eval_fraction: share of the rows that are held out, from the end of a shuffle seeded with ``seed``;
            above zero, at least one row is held out and at least one is trained.
        seed: decides the split.
        packing: several rows share a sequence of ``seq_len`` tokens.
        folder: keeps the tokenized rows, and is used again for the same file, tokenizer and ``seq_len``; by
            default they lie in a temporary file that is gone with the result.

    Raises:
        InputError: the file or a row cannot be used, or nothing is left to train.
    """
    path = Path(path)
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            store = _tokenized(path, format, tokenizer, seq_len, Path(temporary) / "tokens")
    else:
        store = _tokenized(path, format, tokenizer, seq_len, folder)
    counts = store.facts
    order = permutation(len(store), "split", seed)
    num_train = len(order) - _num_held_out(len(order), eval_fraction)
    if num_train < 1:
        raise InputError(FIELD, f"none of the {counts['num_rows']} rows has a token to train within seq_len {seq_len}")
    capacity = seq_len if packing else None
    train, evaluation = Examples(store, order[:num_train], capacity), Examples(store, order[num_train:], capacity)
    stats = DatasetStats(
        num_rows=counts["num_rows"],
        num_train_rows=num_train,
        num_eval_rows=len(order) - num_train,
        num_truncated_rows=counts["num_truncated_rows"],
        num_skipped_rows=counts["num_rows"] - len(order),
        num_train_tokens=train.num_tokens,
        num_packed_sequences=len(train) if packing else None,
        packing_density=train.num_tokens / (len(train) * seq_len) if packing else None,
        sha256=counts["sha256"],
    )
    return DatasetSplits(train, evaluation, stats)


def with_validation(
    splits: DatasetSplits,
    path: str | Path,
    format: FormatChoice,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    seed: int,
    *,
    packing: bool = False,
    folder: Path | None = None,
) -> DatasetSplits:
    """The splits with every row of another file as what is held out; arguments as of `load_dataset`.

    Raises:
        InputError: for ``dataset.validation_path``, as `load_dataset` does.
    """
    try:
        other = load_dataset(path, format, tokenizer, seq_len, 0.0, seed, packing=packing, folder=folder)
    except InputError as error:
        raise InputError(VALIDATION_FIELD, error.message) from error
    stats = replace(splits.stats, num_eval_rows=other.stats.num_train_rows)
    return DatasetSplits(splits.train, other.train, stats)


def _num_held_out(num_rows: int, fraction: float) -> int:
    if fraction <= 0:
        return 0
    return max(0, min(max(round(num_rows * fraction), 1), num_rows - 1))


def _tokenized(
    path: Path, format: FormatChoice, tokenizer: PreTrainedTokenizerBase, seq_len: int, folder: Path
) -> TokenStore:
    """The rows of the file in a store: the one in ``folder`` if it was made from the same, else a new one."""
    encoder = Encoder(tokenizer)
    next(iter(RowReader(path, format)))  # says what is wrong with a file that cannot be read
    digest = sha256_file(path)
    key = _store_key(path, format, tokenizer, seq_len, digest)
    store = TokenStore.open(folder, key)
    if store is not None:
        return store
    counts = _Counts()
    with StoreWriter(folder) as writer:
        for batch in _batches_of(RowReader(path, format)):
            for tokens in _encoded(batch, encoder, seq_len):
                counts.num_rows += 1
                counts.num_truncated_rows += len(tokens.input_ids) > seq_len
                kept = Tokens(tokens.input_ids[:seq_len], tokens.labels[:seq_len])
                if _is_trained(kept):
                    writer.append(kept)
        if sha256_file(path) != digest:
            raise InputError(FIELD, f"{path.name} changed while it was read")
        return writer.finish(key, asdict(counts) | {"sha256": digest})


@dataclass(slots=True)
class _Counts:
    num_rows: int = 0
    num_truncated_rows: int = 0


def _store_key(path: Path, format: FormatChoice, tokenizer: PreTrainedTokenizerBase, seq_len: int, digest: str) -> str:
    """Digest of everything that decides the tokens."""
    code = [sha256_file(module) for module in sorted(Path(__file__).parent.glob("*.py"))]
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    names = [type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map]
    rules = [version("transformers"), tokenizer.backend_tokenizer.to_str(), *names]
    made_from = [code, digest, suffixes, format, seq_len, *rules]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()


def _batches_of(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in batches of bounded size, so that a tokenizer has enough to do and memory stays small."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += _num_characters(row)
        if len(batch) == _BATCH_ROWS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _num_characters(row: Row) -> int:
    if isinstance(row.content, RawText):
        return len(row.content.prompt) + len(row.content.completion)
    return sum(len(message.content) for message in row.content.messages)


def _encoded(rows: Sequence[Row], encoder: Encoder, seq_len: int) -> Iterator[Tokens]:
    rendered = []
    for row in rows:
        try:
            rendered.append(encoder.render(row.content))
        except ValueError as error:
            raise InputError(FIELD, f"{row.place}: {error}") from error
    for row, tokens in zip(rows, encoder.encode_all(rendered), strict=True):
        if isinstance(row.content, RawText) and row.content.is_running:
            yield from encoder.pieces(tokens, seq_len)
        else:
            yield tokens


def _is_trained(tokens: Tokens) -> bool:
    # The first token has no context to be predicted from: its label never counts.
    return any(label != IGNORE_INDEX for label in islice(tokens.labels, 1, None))
