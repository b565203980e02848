"""A traced step as data: blocks of memory, and when they come and go, segment by segment. Pure.

A segment is a part of the step that belongs to one place of the network in one phase: ``forward`` of layer 3,
``backward`` of the head. Inside a segment, event ``i >= 0`` allocates block ``i`` and event ``-1 - i`` frees
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

CATEGORIES = ("weights", "gradients", "optimizer_states", "activations", "loss", "workspace", "other")
EMBED, HEAD = -1, -2
"""Places that are not layers: before the first layer; after the last one (final norm, head and loss)."""


class Block(NamedTuple):
    """One allocation: bytes asked for, index into CATEGORIES, the traced slice whose gradient it
    is, or −1.
    """

    size_bytes: int
    category: int
    slice_ordinal: int = -1


@dataclass(frozen=True, slots=True)
class Segment:
    """Events and work of one place in one phase. ``work`` lists (flops, bytes moved, number of such
    operations).
    """

    phase: str
    place: int
    events: tuple[int, ...]
    work: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class StepTrace:
    """One traced micro-batch of one chunk: forward and backward.

    Two traces are the same one or differ, so that what follows from a trace can be kept under it.
    """

    blocks: tuple[Block, ...]
    segments: tuple[Segment, ...]
    slice_numels: tuple[int, ...]
    """Elements of the traced chunk's slices in traced layers and outside, to scale the gradients of cut ones.
    """

    def to_json(self) -> dict[str, Any]:
        """Plain values for the cache."""
        return {
            "blocks": list(zip(*self.blocks, strict=True)),  # by column: read in half the time
            "segments": [[s.phase, s.place, s.events, s.work] for s in self.segments],
            "slice_numels": self.slice_numels,
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> StepTrace:
        """Inverse of :meth:`to_json`."""
        return StepTrace(
            tuple(map(Block._make, zip(*value["blocks"], strict=True))),
            tuple(
                Segment(p, n, tuple(e), tuple((w[0], w[1], w[2]) for w in work)) for p, n, e, work in value["segments"]
            ),
            tuple(value["slice_numels"]),
        )
