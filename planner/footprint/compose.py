"""From traced blocks to the events of a whole step: repeats the layers that stand for many. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from chunkplan.planner.trace.layers import Copies, LayerRun, births, freed_everywhere, real_places
from chunkplan.planner.trace.step_trace import Block, Segment, StepTrace


class CompositionError(RuntimeError):
    """The traced layers do not repeat: the whole model must be traced."""


@dataclass(frozen=True, slots=True)
class ComposedSegment:
    """One segment of the whole step: its traced segment, the real layer (or place outside the layers), its
    events.

    Events are (block number, bytes, ordinal of the slice whose gradient it is or −1); negative bytes free the
    block.
    """

    phase: str
    place: int
    events: list[tuple[int, int, int]]
    traced: Segment


def compose(
    trace: StepTrace,
    runs: Sequence[LayerRun],
    slice_numels: Sequence[int],
    itemsize: int,
    slices: Sequence[Sequence[int]] = (),
) -> list[ComposedSegment]:
    """The step's segments in order of time, for all layers.

    Args:
        trace: of the distinct layers of ``runs``.
        runs: the layers of the whole model.
        slice_numels: elements of the chunk's slices that the traced ones stand for (the first of each, see
            :func:`chunkplan.planner.trace.roles.stand_ins`): gradients of cut ones are scaled from the traced
            sizes.
        itemsize: bytes per element of a gradient.
        slices: which slices those are; with them, events name the chunk's slices, else the traced ones.

    Raises:
        CompositionError: a reference between layers cannot be resolved.
    """
    copies = Copies.of(runs)
    born = births(trace)
    blocks = [_scaled(block, trace, slice_numels, itemsize) for block in trace.blocks]
    numbers: dict[tuple[str, int, int], int] = {}
    sizes: dict[int, tuple[int, int]] = {}
    composed = []
    for segment, here in _real_segments(trace.segments, copies):
        shared = freed_everywhere(segment, born)
        events: list[tuple[int, int, int]] = []
        for event in segment.events:
            if event >= 0:
                number = len(sizes)
                block = blocks[event]
                numbers[segment.phase, here, born[event][2]] = number
                ordinal_of_slice = block.slice_ordinal
                if slices and ordinal_of_slice >= 0:
                    stood_for = slices[ordinal_of_slice]
                    copy = here - copies.first[segment.place] if len(stood_for) > 1 else 0
                    ordinal_of_slice = stood_for[copy]
                sizes[number] = (block.size_bytes, ordinal_of_slice)
                events.append((number, block.size_bytes, ordinal_of_slice))
                continue
            phase, _, ordinal = birth = born[-1 - event]
            for place in real_places(segment, here, birth, copies, shared):
                number = numbers.pop((phase, place, ordinal), -1)
                if number < 0:
                    raise CompositionError(f"{segment.phase} of {here} frees an unknown block of {phase} of {place}")
                size_bytes, ordinal_of_slice = sizes[number]
                events.append((number, -size_bytes, ordinal_of_slice))
        composed.append(ComposedSegment(segment.phase, here, events, segment))
    return composed


def _real_segments(segments: Sequence[Segment], copies: Copies) -> Iterator[tuple[Segment, int]]:
    """Every segment with the real place it stands for, repeated ones in the order of their phase."""
    for segment in segments:
        if segment.place < 0:
            yield segment, segment.place
            continue
        real = copies.real(segment.place)
        yield from ((segment, layer) for layer in (real if segment.phase == "forward" else reversed(real)))


def _scaled(block: Block, trace: StepTrace, slice_numels: Sequence[int], itemsize: int) -> Block:
    """The block with the size that the planned chunk's slice gives it."""
    ordinal = block.slice_ordinal
    if ordinal < 0:
        return block
    difference = slice_numels[ordinal] - trace.slice_numels[ordinal]
    return Block(block.size_bytes + difference * itemsize, block.category, ordinal)
