"""Simulator of PyTorch's CUDA caching allocator: what it reserves for a stream of allocations and frees.

Follows c10/cuda/CUDACachingAllocator.cpp (torch 2.11 to 2.13, default settings but for
``expandable_segments``): rounding, best fit by (size, address), splitting, merging, release of unsplit
segments before giving up. Not modelled: ``record_stream`` (a block is reusable once it is freed),
``max_split_size_mb``, garbage collection, private pools. All sizes are bytes. Pure: no I/O, no torch.
"""

from __future__ import annotations

from bisect import bisect_left

from chunkplan.engine.arithmetic import round_up

MIB = 1024**2
MIN_BLOCK_BYTES = 512
SMALL_BYTES = MIB
"""Largest request (after rounding) that the small pool serves."""
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
MIN_LARGE_BYTES = 10 * MIB
"""Requests from here on get a segment of their own, rounded up to ``LARGE_ROUND_BYTES``."""
LARGE_ROUND_BYTES = 2 * MIB

_LIVE, _FREE, _UNMAPPED = 0, 1, 2
_ADDRESS_BITS = 64
_SPACE_BYTES = LARGE_SEGMENT_BYTES << 26
"""Address space of one expandable segment: more than any device has memory, and a whole number of pages."""


class OutOfDeviceMemoryError(Exception):
    """The simulated device cannot serve a request, even after every cached segment was given back."""

    def __init__(self, requested_bytes: int, allocated_bytes: int, reserved_bytes: int, capacity_bytes: int) -> None:
        super().__init__(
            f"tried to allocate {requested_bytes} bytes; {allocated_bytes} allocated, {reserved_bytes} reserved "
            f"of {capacity_bytes}"
        )
        self.requested_bytes = requested_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.capacity_bytes = capacity_bytes


class _Block:
    """A range of one segment: live, free (cached) or, in an expandable segment, address space
    without memory.
    """

    __slots__ = ("address", "next", "pool", "previous", "size", "state")

    def __init__(self, address: int, size: int, pool: _Pool, state: int, previous: _Block | None) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.state = state
        self.previous = previous
        self.next: _Block | None = None


class _Pool:
    """Free blocks of one stream and size class, sorted by (size, address): ``keys`` and ``blocks`` run in
    parallel.
    """

    __slots__ = ("blocks", "is_small", "keys", "page", "split_from", "unmapped")

    def __init__(self, is_small: bool, expandable: bool) -> None:
        self.is_small = is_small
        self.page = SMALL_SEGMENT_BYTES if is_small else LARGE_SEGMENT_BYTES
        self.split_from = MIN_BLOCK_BYTES if is_small or expandable else SMALL_BYTES + 1
        """A block is split when at least this much of it would be left over."""
        self.keys: list[int] = []
        self.blocks: list[_Block] = []
        self.unmapped: list[_Block] = []

    def insert(self, block: _Block) -> None:
        block.state = _FREE
        key = block.size << _ADDRESS_BITS | block.address
        at = bisect_left(self.keys, key)
        self.keys.insert(at, key)
        self.blocks.insert(at, block)

    def remove(self, block: _Block) -> None:
        at = bisect_left(self.keys, block.size << _ADDRESS_BITS | block.address)
        del self.keys[at]
        del self.blocks[at]


class CachingAllocator:
    """One device's caching allocator.

    Args:
        capacity_bytes: memory that segments may take together; None is unlimited.
        expandable_segments: grow one segment per stream and pool by pages instead of asking for new segments.
    """

    def __init__(self, capacity_bytes: int | None = None, expandable_segments: bool = False) -> None:
        self.capacity_bytes = capacity_bytes
        self.expandable_segments = expandable_segments
        self.allocated_bytes = 0
        """Sum of the live blocks: requests rounded up, plus what a block could not give away by splitting."""
        self.reserved_bytes = 0
        """Sum of the segments."""
        self.max_allocated_bytes = 0
        self.max_reserved_bytes = 0
        self._live: dict[int, _Block | None] = {}
        self._small_pools: dict[int, _Pool] = {}
        self._large_pools: dict[int, _Pool] = {}
        self._next_address = 0

    def malloc(self, block_id: int, size_bytes: int, stream: int = 0) -> None:
        """Allocate ``size_bytes`` under a name of the caller's choice; zero bytes take nothing, as in
        PyTorch.

        Raises:
            OutOfDeviceMemoryError: the capacity does not suffice.
            ValueError: ``block_id`` is live, or the size is negative.
        """
        live = self._live
        if block_id in live:
            raise ValueError(f"block {block_id} is already allocated")
        size = (size_bytes + 511) & -512
        if size <= 0:
            if size_bytes < 0:
                raise ValueError(f"cannot allocate {size_bytes} bytes")
            live[block_id] = None
            return
        try:
            pool = self._small_pools[stream] if size <= SMALL_BYTES else self._large_pools[stream]
        except KeyError:
            pool = self._new_pool(stream, size <= SMALL_BYTES)
        keys = pool.keys
        at = bisect_left(keys, size << _ADDRESS_BITS)
        if at == len(keys):
            block = self._grow(pool, size)
        else:
            if self.expandable_segments:
                at = _least_expandable(pool.blocks, at)
            del keys[at]
            block = pool.blocks.pop(at)
        remaining = block.size - size
        if remaining >= pool.split_from:
            _split(block, size)
        block.state = _LIVE
        live[block_id] = block
        allocated = self.allocated_bytes = self.allocated_bytes + block.size
        if allocated > self.max_allocated_bytes:
            self.max_allocated_bytes = allocated

    def free(self, block_id: int) -> None:
        """Give a block back to the cache; it merges with free neighbours of its segment.

        Raises:
            KeyError: no such live block.
        """
        block = self._live.pop(block_id)
        if block is None:
            return
        self.allocated_bytes -= block.size
        block.pool.insert(_merge(block, _FREE))

    def empty_cache(self) -> None:
        """Give every free segment (expandable: every wholly free page) back to the device."""
        for pool in [*self._large_pools.values(), *self._small_pools.values()]:
            for block in list(pool.blocks):
                if self.expandable_segments:
                    self._unmap(block)
                elif block.previous is None and block.next is None:
                    pool.remove(block)
                    self.reserved_bytes -= block.size

    def live_ranges(self) -> dict[int, tuple[int, int]]:
        """(simulated address, size) of every live block by its id, zero-byte ones left out."""
        return {name: (block.address, block.size) for name, block in self._live.items() if block is not None}

    def _new_pool(self, stream: int, is_small: bool) -> _Pool:
        pool = _Pool(is_small, self.expandable_segments)
        (self._small_pools if is_small else self._large_pools)[stream] = pool
        if self.expandable_segments:
            pool.unmapped.append(_Block(self._next_address, _SPACE_BYTES, pool, _UNMAPPED, None))
            self._next_address += _SPACE_BYTES
        return pool

    def _grow(self, pool: _Pool, size: int) -> _Block:
        """A block of at least ``size`` bytes on fresh memory, taken out of the free list."""
        attempt = self._map_more if self.expandable_segments else self._new_segment
        block = attempt(pool, size)
        if block is None:
            self.empty_cache()
            block = attempt(pool, size)
        if block is None:
            raise OutOfDeviceMemoryError(size, self.allocated_bytes, self.reserved_bytes, self.capacity_bytes or 0)
        return block

    def _reserve(self, size: int) -> bool:
        if self.capacity_bytes is not None and self.reserved_bytes + size > self.capacity_bytes:
            return False
        self.reserved_bytes += size
        self.max_reserved_bytes = max(self.max_reserved_bytes, self.reserved_bytes)
        return True

    def _new_segment(self, pool: _Pool, size: int) -> _Block | None:
        segment_bytes = segment_size_bytes(size)
        if not self._reserve(segment_bytes):
            return None
        block = _Block(self._next_address, segment_bytes, pool, _LIVE, None)
        self._next_address += segment_bytes
        return block

    def _map_more(self, pool: _Pool, size: int) -> _Block | None:
        """Extend the lowest run of free and unmapped blocks that has room for ``size`` bytes."""
        block = _lowest_run(pool, size)
        if block.state == _UNMAPPED:
            mapped = self._map(block, min(block.size, size))
            if mapped is None:
                return None
            block = mapped
        while block.size < size:
            following = block.next
            assert following is not None
            mapped = self._map(following, min(size - block.size, following.size))
            if mapped is None:
                return None
            block = mapped
        pool.remove(block)
        return block

    def _map(self, block: _Block, size: int) -> _Block | None:
        """Put whole pages under the first ``size`` bytes of an unmapped block; returns the merged
        free block.
        """
        pool = block.pool
        mapped_bytes = round_up(size, pool.page)
        if not self._reserve(mapped_bytes):
            return None
        pool.unmapped.remove(block)
        if mapped_bytes < block.size:
            rest = _cut(block, mapped_bytes)
            rest.state = _UNMAPPED
            _insert_by_address(pool.unmapped, rest)
        block = _merge(block, _FREE)
        pool.insert(block)
        return block

    def _unmap(self, block: _Block) -> None:
        """Take the memory from under the pages that a free block covers whole; its ends stay free."""
        pool = block.pool
        begin = round_up(block.address, pool.page)
        end = (block.address + block.size) // pool.page * pool.page
        if end <= begin:
            return
        pool.remove(block)
        self.reserved_bytes -= end - begin
        if end < block.address + block.size:
            pool.insert(_cut(block, end - block.address))
        if begin > block.address:
            middle = _cut(block, begin - block.address)
            pool.insert(block)
            block = middle
        block.state = _UNMAPPED
        _insert_by_address(pool.unmapped, _merge(block, _UNMAPPED))


def segment_size_bytes(size_bytes: int) -> int:
    """What the allocator asks the device for to serve a (rounded) request."""
    if size_bytes <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size_bytes < MIN_LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return round_up(size_bytes, LARGE_ROUND_BYTES)


def _cut(block: _Block, size: int) -> _Block:
    """Shorten ``block`` to ``size`` bytes; returns the rest, linked behind it, in no list."""
    rest = _Block(block.address + size, block.size - size, block.pool, block.state, block)
    following = block.next
    rest.next = following
    if following is not None:
        following.previous = rest
    block.next = rest
    block.size = size
    return rest


def _split(block: _Block, size: int) -> None:
    """Shorten ``block`` to ``size`` bytes; the rest becomes free."""
    block.pool.insert(_cut(block, size))


def _merge(block: _Block, state: int) -> _Block:
    """Join ``block`` (in no list) with the neighbours of its segment that are in ``state``; returns the
    result.
    """
    pool = block.pool
    before = block.previous
    if before is not None and before.state == state:
        _take_out(pool, before)
        block = _join(before, block)
    after = block.next
    if after is not None and after.state == state:
        _take_out(pool, after)
        block = _join(block, after)
    return block


def _take_out(pool: _Pool, block: _Block) -> None:
    if block.state == _FREE:
        pool.remove(block)
    else:
        pool.unmapped.remove(block)


def _join(left: _Block, right: _Block) -> _Block:
    left.size += right.size
    following = left.next = right.next
    if following is not None:
        following.previous = left
    return left


def _insert_by_address(blocks: list[_Block], block: _Block) -> None:
    blocks.insert(bisect_left([other.address for other in blocks], block.address), block)


def _lowest_run(pool: _Pool, size: int) -> _Block:
    """First block of the lowest run of unmapped and free blocks with ``size`` bytes of address space."""
    for block in pool.unmapped:
        before = block.previous
        start = before if before is not None and before.state == _FREE else block
        room, current = 0, start
        while current.state != _LIVE and room < size:
            room += current.size
            if current.next is None:
                break
            current = current.next
        if room >= size:
            return start
    raise AssertionError("the last unmapped block has room for anything")


def _least_expandable(blocks: list[_Block], at: int) -> int:
    """Among the blocks from ``at`` on, walk to one that could grow less (unmapped space behind a block
    counts).
    """
    while at + 1 < len(blocks) and _expandable_size(blocks[at + 1]) < _expandable_size(blocks[at]):
        at += 1
    return at


def _expandable_size(block: _Block) -> int:
    following = block.next
    return block.size + (following.size if following is not None and following.state == _UNMAPPED else 0)
