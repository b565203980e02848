"""Tokenized rows on disk, so that memory does not grow with the data. Imports no torch.

| file | content |
|---|---|
| ``tokens.bin`` | int32 for every token: its id where it is trained, the id's complement where it is not |
| ``offsets.bin`` | int64: where each row begins, and where the last one ends |
| ``store.json`` | written last: what the rows were made from, what became of them, digests of the two files |

Rows are read with pread rather than mapped: pages of a map would count as the process's memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import weakref
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkplan.engine.data.tokens import IGNORE_INDEX, Tokens
from chunkplan.engine.files import sha256_file, sync_path

_TOKENS, _OFFSETS, _MANIFEST = "tokens.bin", "offsets.bin", "store.json"
_BUFFER_BYTES = 2**20
_ITEMSIZE = 4


class TokenStore:
    """Rows of a finished store, by index; its files may be deleted while it is open.

    Args:
        folder: of the store.
        facts: what was given to :meth:`StoreWriter.finish`.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.facts = facts
        self._offsets: NDArray[np.int64] = np.fromfile(folder / _OFFSETS, dtype=np.int64)
        self._descriptor = os.open(folder / _TOKENS, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    @classmethod
    def open(cls, folder: Path, key: str) -> TokenStore | None:
        """Return the store that was made from what ``key`` stands for; None if it is another, or damaged."""
        try:
            manifest = json.loads((folder / _MANIFEST).read_text())
            is_whole = manifest["key"] == key and all(
                sha256_file(folder / name) == digest for name, digest in manifest["sha256"].items()
            )
            return cls(folder, manifest["facts"]) if is_whole else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self._offsets)

    def __getitem__(self, index: int) -> Tokens:
        """One row.

        Raises:
            OSError: the file has lost what it held.
        """
        first, last = int(self._offsets[index]), int(self._offsets[index + 1])
        data = os.pread(self._descriptor, (last - first) * _ITEMSIZE, first * _ITEMSIZE)
        if len(data) != (last - first) * _ITEMSIZE:
            raise OSError(f"the token store ends before row {index}")
        stored = np.frombuffer(data, dtype=np.int32)
        is_trained = stored >= 0
        ids = np.where(is_trained, stored, ~stored)
        return Tokens(ids.tolist(), np.where(is_trained, stored, IGNORE_INDEX).tolist())


class StoreWriter:
    """Fills the folder of a store, whatever was in it before, row by row."""

    def __init__(self, folder: Path) -> None:
        remove_store(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._offsets = array("q", [0])
        self._digest = hashlib.sha256()
        self._file = (folder / _TOKENS).open("wb", buffering=0)
        self._buffer = bytearray()

    def append(self, tokens: Tokens) -> None:
        """Add a row."""
        ids, labels = np.array(tokens.input_ids, dtype=np.int32), np.array(tokens.labels, dtype=np.int32)
        self._buffer += np.where(labels == IGNORE_INDEX, ~ids, ids).tobytes()
        self._offsets.append(self._offsets[-1] + len(ids))
        if len(self._buffer) >= _BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._digest.update(self._buffer)
        view = memoryview(self._buffer)
        while view:
            view = view[self._file.write(view) :]
        del view
        self._buffer.clear()

    def finish(self, key: str, facts: dict[str, Any]) -> TokenStore:
        """Complete the store and open it.

        Args:
            key: stands for everything that the rows were made from.
            facts: JSON values to keep beside the rows.
        """
        self._flush()
        self._file.close()
        (self._folder / _OFFSETS).write_bytes(memoryview(self._offsets).cast("B"))
        digests = {_TOKENS: self._digest.hexdigest(), _OFFSETS: sha256_file(self._folder / _OFFSETS)}
        for name in digests:
            sync_path(self._folder / name)
        partial = self._folder / f"{_MANIFEST}.partial"
        partial.write_text(json.dumps({"key": key, "facts": facts, "sha256": digests}))
        sync_path(partial)
        partial.rename(self._folder / _MANIFEST)
        sync_path(self._folder)
        return TokenStore(self._folder, facts)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def remove_store(folder: Path) -> None:
    """Delete a store; nothing happens where there is none."""
    shutil.rmtree(folder, ignore_errors=True)


def permutation(num_items: int, *seed: str | int) -> NDArray[np.uint32]:
    """Numbers below ``num_items`` in an order that depends on the seed alone, on any version of numpy.

    The generator is numpy's legacy one, whose stream is frozen (numpy enhancement proposal 19): a run must
    find the same order when another version resumes it.
    """
    digest = hashlib.sha256(" ".join(map(str, seed)).encode()).digest()
    order = np.arange(num_items, dtype=np.uint32)
    np.random.RandomState(np.frombuffer(digest, dtype=np.uint32)).shuffle(order)
    return order
