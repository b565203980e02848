"""Rows that share a sequence: how they are packed, and that none sees another."""

import numpy as np
import pytest

from engine.packing import pack


def rows_of(packing):
    return [packing.members[a:b].tolist() for a, b in zip(packing.bounds, packing.bounds[1:], strict=False)]


def plain_best_fit(lengths, capacity):
    """The textbook's rule, one row at a time."""
    sequences = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        fitting = [s for s in sequences if s[0] >= lengths[row]]
        if not fitting:
            sequences.append(fitting := [capacity, []])
            fitting = [fitting]
        best = min(fitting, key=lambda s: s[0])
        best[0] -= lengths[row]
        best[1].append(row)
    return sequences


@pytest.mark.parametrize(
    ("seed", "count", "low", "capacity"), [(0, 1, 2, 9), (1, 40, 1, 10), (2, 300, 2, 64), (3, 500, 90, 128)]
)
def test_packing_is_best_fit_decreasing(seed, count, low, capacity):
    lengths = np.random.RandomState(seed).randint(low, capacity + 1, count).astype(np.int64)
    packed = rows_of(pack(lengths, capacity))
    assert sorted(row for sequence in packed for row in sequence) == list(range(count))
    assert all(lengths[sequence].sum() <= capacity for sequence in packed)
    expected = plain_best_fit(lengths.tolist(), capacity)
    assert sorted(capacity - lengths[sequence].sum() for sequence in packed) == sorted(s[0] for s in expected)


def test_packing_is_the_same_every_time_and_fills_what_rows_leave():
    lengths = np.array([6, 4, 4, 3, 3, 2, 10, 8], dtype=np.int64)
    assert rows_of(pack(lengths, 10)) == rows_of(pack(lengths, 10)) == [[6], [7, 5], [0, 1], [2, 3, 4]]


def test_a_million_rows_are_packed_in_a_moment():
    lengths = np.random.RandomState(0).gamma(2.0, 150.0, 1_000_000).astype(np.int64).clip(2, 2048)
    packing = pack(lengths, 2048)
    assert len(packing.members) == 1_000_000
    assert lengths.sum() / (len(packing) * 2048) > 0.999
