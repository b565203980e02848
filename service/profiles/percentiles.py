"""Percentiles from counts: magnitudes are put into buckets whose bounds grow by a constant factor, so that a
percentile read from the counts is within 2 % of the exact one (the idea of DDSketch, Masson et al. 2019), and
databases need only group and add, which they all do alike.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate

_SMALLEST = 1e-6
"""Bucket 0 holds everything up to this: an error of a millionth is none."""
_GROWTH = 1.04
_LARGEST_BUCKET = 1000


def bucket_of(magnitude: float) -> int:
    """The bucket of a magnitude that is not negative."""
    if magnitude <= _SMALLEST:
        return 0
    return min(math.ceil(math.log(magnitude / _SMALLEST, _GROWTH)), _LARGEST_BUCKET)


def percentiles(counts: Mapping[int, int], shares: Sequence[float], *, highest: float) -> list[float]:
    """For each share, the magnitude that so many of the counted ones do not exceed.

    Args:
        counts: how many magnitudes lie in each bucket; not empty.
        shares: 0 to 1.
        highest: the exact highest of them, which no percentile exceeds.
    """
    buckets = sorted(counts)
    reached = list(accumulate(counts[bucket] for bucket in buckets))
    places = (bisect_left(reached, max(1, math.ceil(share * reached[-1]))) for share in shares)
    return [min(_middle(buckets[place]), highest) for place in places]


def _middle(bucket: int) -> float:
    """The magnitude that is, relative to itself, equally far from both bounds."""
    return 2 * _SMALLEST * _GROWTH**bucket / (1 + _GROWTH) if bucket else 0.0
