"""From files to batches: rows are read, rendered, tokenized, kept on disk, packed and collated. Imports no
torch.
"""

from chunkplan.engine.data.dataset import (
    LENGTH_MULTIPLE,
    Batches,
    DatasetInfo,
    DatasetSplits,
    DatasetStats,
    Example,
    Examples,
    check_dataset,
    collate,
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
    "load_dataset",
    "with_validation",
]
