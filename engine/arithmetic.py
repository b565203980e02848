"""Divisions of whole numbers that round up."""

from __future__ import annotations


def ceil_div(value: int, by: int) -> int:
    """The least whole number that is no less than ``value / by``.

    >>> ceil_div(7, 2)
    4
    """
    return -(-value // by)


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is no less than ``value``.

    >>> round_up(1000, 512)
    1024
    """
    return -(-value // multiple) * multiple
