"""One pool of the caching allocator, in which what happened before is known when it happens again. Pure.

Follows :class:`chunkplan.planner.allocator.caching.CachingAllocator` in its classic mode without a limit:
pools do not touch each other, and segments only come. What is free follows then from the segments and from
where the live blocks lie. These two are a state; the same program makes the same of it every time, and a
cycle is full of repetition: the layers below a chunk in every visit, the layers above it once those on top of
them are done.

Sizes and addresses count blocks of 512 bytes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Container, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from chunkplan.engine.arithmetic import ceil_div
from chunkplan.planner.allocator.caching import MIN_BLOCK_BYTES, SMALL_BYTES, segment_size_bytes

LARGEST_SMALL = SMALL_BYTES // MIN_BLOCK_BYTES
"""Size of the largest block that the small pool serves."""
_BITS = 40
_ADDRESS = (1 << _BITS) - 1

_RANDOM = Random(0)
_MARKS: list[int] = []

Op = tuple[int, Any]
"""(size, name) takes a block of at least one unit, (0, name) gives it back. Names are integers other than 0.

(size, operations), with a tuple in place of the name: these take as much together, and give all of it back.
"""


def units(size_bytes: int) -> int:
    """A request as the allocator rounds it."""
    return ceil_div(size_bytes, MIN_BLOCK_BYTES)


def without_round_trips(ops: Sequence[Op]) -> list[Op]:
    """Operations in which a stretch that leaves everything as it was is one operation.

    A stretch that takes blocks and gives back just those leaves the same blocks live where they were. It
    needs no segment where a free extent is as large as all of them together: its end stays free, wherever the
    rest is put.

    >>> take, give = (4, 1), (0, 1)
    >>> without_round_trips([(2, 7), take, give])  # block 7 stays; block 1 comes and goes
    [(2, 7), (4, ((4, ((4, 1), (0, 1))),))]
    """
    given = {name for size, name in ops if not size}
    marks: dict[int, int] = {}
    live, seen, last = 0, [0], {0: 0}
    for at, ((size, name), mark) in enumerate(zip(ops, _marks(len(ops)), strict=True), start=1):
        if not size and name in marks:
            live ^= marks[name]
        else:  # what came before or stays for good never comes back to what it was
            live ^= mark
            if size and name in given:
                marks[name] = mark
        seen.append(live)
        last[live] = at
    found: list[Op] = []
    known: dict[tuple[Op, ...], tuple[Op, ...]] = {}
    at = 0
    while at < len(ops):
        begin, end = seen[at], last[seen[at]]
        if end == at:
            found.append(ops[at])
            at += 1
            continue
        parts: list[Op] = []
        start = at
        while at < end:
            first, together = at, 0
            while at == first or seen[at] != begin:
                together += ops[at][0]
                at += 1
            part = tuple(ops[first:at]) if first == start and at == end else _renamed(ops[first:at])
            parts.append((together, known.setdefault(part, part)))
        found.append((max(need for need, _ in parts), tuple(parts)))
    return found


def _marks(num_ops: int) -> list[int]:
    """Stand for operations by their positions: sets of them are told apart by the exclusive or of their
    marks.

    Random ones of 128 bits, the same in every process: that two sets look alike is one chance in 2^128.
    """
    while len(_MARKS) < num_ops:
        _MARKS.append(_RANDOM.getrandbits(128))
    return _MARKS[:num_ops]


def _renamed(ops: Sequence[Op]) -> tuple[Op, ...]:
    """With names of their own, in the order in which they come: nobody else sees these blocks."""
    names: dict[int, int] = {}
    return tuple([(size, names.setdefault(name, len(names) + 1)) for size, name in ops])


class Program:
    """Operations in their order. It is known again by its identity: use one object for equal operations.

    Positive names are relative to a place, and follow it when it moves.
    """

    __slots__ = ("ops",)

    def __init__(self, ops: Sequence[Op]) -> None:
        self.ops = without_round_trips(ops)


@dataclass(frozen=True, slots=True)
class _State:
    """Free and live extents as ``size << _BITS | address``."""

    free: list[int]
    """Sorted: by size, then by address."""
    starts: dict[int, int]
    """Free extents by where they begin."""
    ends: dict[int, int]
    """Free extents by where they end."""
    live: dict[int, int]
    """By name."""


class Pool:
    """One pool: where it stands, and what is known of it."""

    def __init__(self, *, is_small: bool) -> None:
        self._split_from = (1 if is_small else LARGEST_SMALL + 1) << _BITS
        self._num_segments = 0
        self._end = 0
        self.reserved_bytes = 0
        """Bytes of all segments."""
        self.num_simulated = 0
        """Operations that were not known from before."""
        self._states: list[_State] = []
        self._numbers: dict[tuple[int, ...], int] = {}
        self._after: dict[tuple[int, Program, int], int] = {}
        """By state, program, and how far the place has moved."""
        self._state = self._number(_State([], {}, {}, {}))
        self.base = 0
        """The place that names are relative to."""

    def run(self, program: Program, base: int) -> None:
        """Move to the state after a program whose names are relative to ``base``.

        Raises:
            KeyError: it gives back a block that is not live.
        """
        key = (self._state, program, base - self.base)
        after = self._after.get(key)
        if after is None:
            after = self._after[key] = self._simulated(program.ops, base - self.base)
        self._state, self.base = after, base

    def run_unrecorded(self, ops: Sequence[Op]) -> None:
        """Run operations without round trips that will not come again, and keep no record of them."""
        self._state = self._simulated(ops, 0)

    def names(self) -> list[int]:
        """Names of the live blocks, in the order in which they came."""
        return list(self._states[self._state].live)

    def settle(self) -> None:
        """What lives has no name from now on: it stays where it is for ever."""
        known = self._states[self._state]
        self._state = self._number(_State(known.free, known.starts, known.ends, {}))

    def clear(self, staying: Container[int] = ()) -> None:
        """Give back everything that has a name, but for the ones that stay."""
        names = self.names()
        going = [(0, name) for name in names if name not in staying]
        known = self._numbers.get((self._num_segments,)) if len(going) == len(names) else None
        if known is None:
            known = self._simulated(going, 0)
        self._state = known

    def _number(self, state: _State) -> int:
        key = (self._num_segments, *state.live, *state.live.values())
        number = self._numbers.setdefault(key, len(self._states))
        if number == len(self._states):
            self._states.append(state)
        return number

    def _simulated(self, ops: Sequence[Op], shift: int) -> int:
        """The state after operations.

        Of equal ones in a row that give back all that they take, those after the first that needed no segment
        change nothing.
        """
        self.num_simulated += len(ops)
        before = self._states[self._state]
        free, starts, ends = before.free.copy(), before.starts.copy(), before.ends.copy()
        if shift:
            live = {name + shift if name > 0 else name: extent for name, extent in before.live.items()}
        else:
            live = before.live.copy()
        split_from = self._split_from
        last: object = None
        num_segments = 0
        under_way = [iter(ops)]
        while under_way:
            for size, name in under_way[-1]:
                if size:
                    least = size << _BITS
                    at = bisect_left(free, least)
                    if name.__class__ is tuple:
                        if at < len(free) or (name is last and self._num_segments == num_segments):
                            continue
                        last, num_segments = name, self._num_segments
                        self.num_simulated += len(name)
                        under_way.append(iter(name))  # no extent has room for all of it: one after the other
                        break
                    if at < len(free):
                        extent = free.pop(at)
                        begin = extent & _ADDRESS
                        end = begin + (extent >> _BITS)
                        del starts[begin], ends[end]
                    else:
                        extent = self._new_segment(size)
                        begin = extent & _ADDRESS
                        end = begin + (extent >> _BITS)
                    rest = extent - least
                    if rest >= split_from:
                        rest += size
                        insort(free, rest)
                        starts[begin + size] = ends[end] = rest
                        extent = least | begin
                    live[name] = extent
                else:
                    extent = live.pop(name)
                    begin = extent & _ADDRESS
                    end = begin + (extent >> _BITS)
                    left = ends.pop(begin, 0)
                    if left:
                        del free[bisect_left(free, left)]
                        begin = left & _ADDRESS
                    right = starts.pop(end, 0)
                    if right:
                        del free[bisect_left(free, right)]
                        end += right >> _BITS
                    if left or right:
                        extent = (end - begin) << _BITS | begin
                    insort(free, extent)
                    starts[begin] = ends[end] = extent
            else:
                under_way.pop()
        return self._number(_State(free, starts, ends, live))

    def _new_segment(self, size: int) -> int:
        """A free extent in no list; between two segments lies a gap, over which nothing merges."""
        size_bytes = segment_size_bytes(size * MIN_BLOCK_BYTES)
        self.reserved_bytes += size_bytes
        self._num_segments += 1
        extent = units(size_bytes) << _BITS | self._end + 1
        self._end += units(size_bytes) + 1
        return extent
