"""Whose turn it is. Pure.

Jobs age: a point of priority is worth as much as a fixed time of waiting. As all wait equally fast, the order
of two jobs never changes while they wait, and is that of a time which is known when a job is submitted: whose
is earliest is next. A database finds it with an index, however long the queue is, and no job waits for ever.
"""

from __future__ import annotations

from datetime import datetime, timedelta


def turn_at(created_at: datetime, priority: int, point_seconds: float) -> datetime:
    """When a job without a priority would have come to have the same turn.

    Args:
        created_at: when the job came.
        priority: the higher, the earlier its turn.
        point_seconds: what a point of priority is worth.
    """
    return created_at - timedelta(seconds=priority * point_seconds)
