"""From files to batches: rows are read, tokenized, kept on disk, packed and collated. Imports no torch."""

from chunkplan.engine.data.batches import LENGTH_MULTIPLE, Batches, Example, Examples, collate, joined
from chunkplan.engine.data.dataset import (
    DatasetInfo,
    DatasetSplits,
    DatasetStats,
    check_dataset,
    load_dataset,
    with_validation,
)
from chunkplan.engine.data.tokens import IGNORE_INDEX

__all__ = [
    "IGNORE_INDEX",
    "LENGTH_MULTIPLE",
    "Batches",
    "DatasetInfo",
    "DatasetSplits",
    "DatasetStats",
    "Example",
    "Examples",
    "check_dataset",
    "collate",
    "joined",
    "load_dataset",
    "with_validation",
]
