"""The allocator simulator: PyTorch's published behaviour on known cases, and what must hold for
any program.
"""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkplan.planner.allocator.caching import MIB, CachingAllocator, OutOfDeviceMemoryError, segment_size_bytes

GIB = 1024 * MIB


def test_a_request_takes_whole_blocks_of_512_bytes_in_a_2_mib_segment():
    allocator = CachingAllocator()
    allocator.malloc(1, 1)
    allocator.malloc(2, 513)
    assert allocator.allocated_bytes == 512 + 1024
    assert allocator.reserved_bytes == 2 * MIB


@pytest.mark.parametrize(
    ("size_bytes", "segment_bytes"),
    [
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (155 * MIB - 7, 156 * MIB),
    ],
)
def test_the_first_request_decides_the_segment(size_bytes, segment_bytes):
    allocator = CachingAllocator()
    allocator.malloc(0, size_bytes)
    assert allocator.reserved_bytes == segment_bytes == segment_size_bytes(size_bytes)


def test_published_reserved_peak_of_a_tiny_llama_run():
    """optimum-benchmark's record: 44 040 192 B = two large segments and a small one."""
    allocator = CachingAllocator()
    for block_id, size_bytes in enumerate([8 * MIB, 8 * MIB, 6 * MIB, 3 * MIB, 100_000]):
        allocator.malloc(block_id, size_bytes)
    assert allocator.max_reserved_bytes == 44_040_192


def test_a_large_block_keeps_a_remainder_of_up_to_1_mib():
    """Documented: with the large pool, memory_allocated counts the block, not the request."""
    allocator = CachingAllocator()
    allocator.malloc(0, 12 * MIB)
    allocator.free(0)
    allocator.malloc(1, 11 * MIB)
    assert allocator.allocated_bytes == 12 * MIB
    allocator.free(1)
    allocator.malloc(2, 11 * MIB - 512)
    assert allocator.allocated_bytes == 11 * MIB - 512


def test_the_best_fit_is_reused_and_the_lowest_address_breaks_ties():
    allocator = CachingAllocator()
    for block_id, size_bytes in enumerate([40 * MIB, 20 * MIB, 20 * MIB, 30 * MIB]):
        allocator.malloc(block_id, size_bytes)
    places = allocator.live_ranges()
    for block_id in (0, 2, 1, 3):
        allocator.free(block_id)
    allocator.malloc(4, 18 * MIB)
    assert allocator.live_ranges()[4] == (places[1][0], 18 * MIB)
    assert allocator.max_reserved_bytes == 110 * MIB


def test_freed_neighbours_merge():
    allocator = CachingAllocator()
    for block_id in range(4):
        allocator.malloc(block_id, 5 * MIB)
    for block_id in (0, 2, 1, 3):
        allocator.free(block_id)
    allocator.malloc(9, 20 * MIB)
    assert allocator.max_reserved_bytes == 20 * MIB


def test_streams_do_not_share_cached_memory():
    allocator = CachingAllocator()
    allocator.malloc(0, 4 * MIB, stream=0)
    allocator.free(0)
    allocator.malloc(1, 4 * MIB, stream=1)
    assert allocator.reserved_bytes == 40 * MIB


def test_a_full_device_gives_back_unsplit_segments_before_it_gives_up():
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    allocator.malloc(0, 60 * MIB)
    allocator.free(0)
    allocator.malloc(1, 80 * MIB)
    assert allocator.reserved_bytes == 80 * MIB
    assert allocator.max_reserved_bytes == 80 * MIB


def test_a_split_segment_cannot_be_given_back():
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    allocator.malloc(0, 60 * MIB)
    allocator.free(0)
    allocator.malloc(1, 30 * MIB)
    with pytest.raises(OutOfDeviceMemoryError) as failure:
        allocator.malloc(2, 70 * MIB)
    assert failure.value.requested_bytes == 70 * MIB
    assert failure.value.allocated_bytes == 30 * MIB
    assert failure.value.reserved_bytes == 60 * MIB
    assert failure.value.capacity_bytes == 100 * MIB


def test_expandable_segments_grow_by_pages_where_classic_ones_fragment():
    sizes = [60 * MIB, 70 * MIB, 80 * MIB, 90 * MIB]
    reserved = {}
    for expandable in (False, True):
        allocator = CachingAllocator(expandable_segments=expandable)
        for block_id, size_bytes in enumerate(sizes):
            allocator.malloc(block_id, size_bytes)
            allocator.free(block_id)
        reserved[expandable] = allocator.max_reserved_bytes
    assert reserved == {False: sum(sizes), True: 100 * MIB}


def test_expandable_pools_map_pages_of_2_and_20_mib():
    allocator = CachingAllocator(expandable_segments=True)
    allocator.malloc(0, 1000)
    assert allocator.reserved_bytes == 2 * MIB
    allocator.malloc(1, 21 * MIB)
    assert allocator.reserved_bytes == 42 * MIB
    allocator.malloc(2, 19 * MIB)
    assert allocator.reserved_bytes == 42 * MIB
    assert allocator.allocated_bytes == 40 * MIB + 1024


def test_expandable_segments_give_back_free_pages_around_live_blocks():
    allocator = CachingAllocator(expandable_segments=True)
    for block_id in range(3):
        allocator.malloc(block_id, 50 * MIB)
    allocator.free(1)
    allocator.empty_cache()
    # Block 1 lies at 50 to 100 MiB: of its pages only 60 to 100 are wholly free; 160 MiB were mapped.
    assert allocator.reserved_bytes == 120 * MIB
    allocator.malloc(3, 50 * MIB)
    assert allocator.live_ranges()[3][0] - allocator.live_ranges()[0][0] == 50 * MIB
    assert allocator.reserved_bytes == 160 * MIB


def test_misuse_is_named():
    allocator = CachingAllocator()
    allocator.malloc(7, 0)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 0)
    with pytest.raises(ValueError, match="block 7 is already allocated"):
        allocator.malloc(7, 100)
    with pytest.raises(ValueError, match="-1"):
        allocator.malloc(8, -1)
    with pytest.raises(KeyError):
        allocator.free(9)
    allocator.free(7)


sizes = st.one_of(
    st.integers(0, 4096),
    st.integers(1, 3 * MIB),
    st.integers(MIB, 64 * MIB),
    st.sampled_from([MIB, 10 * MIB, 10 * MIB - 512, 20 * MIB]),
)
# A positive number allocates on one of two streams, a choice in [0, 1) frees, None empties the cache.
programs = st.lists(st.one_of(st.tuples(sizes, st.integers(0, 1)), st.floats(0, 0.999), st.none()), max_size=80)


def run(program, allocator, check=lambda allocator: None):
    """Plays a program; out-of-memory requests are dropped, as a caller that catches the exception would."""
    live = []
    for number, step in enumerate(program):
        if step is None:
            allocator.empty_cache()
        elif isinstance(step, tuple):
            try:
                allocator.malloc(number, step[0], step[1])
                live.append(number)
            except OutOfDeviceMemoryError:
                pass
        elif live:
            allocator.free(live.pop(int(step * len(live))))
        check(allocator)
    return live


def assert_consistent(allocator):
    ranges = sorted(allocator.live_ranges().values())
    for (start, size), (following, _) in itertools.pairwise(ranges):
        assert start + size <= following, "two live blocks overlap"
    assert sum(size for _, size in ranges) == allocator.allocated_bytes
    assert allocator.allocated_bytes <= allocator.reserved_bytes
    assert allocator.allocated_bytes <= allocator.max_allocated_bytes
    assert allocator.reserved_bytes <= allocator.max_reserved_bytes
    if allocator.capacity_bytes is not None:
        assert allocator.reserved_bytes <= allocator.capacity_bytes


@settings(max_examples=150, deadline=None)
@given(program=programs, expandable=st.booleans(), capacity=st.sampled_from([None, 64 * MIB, 300 * MIB]))
def test_any_program_keeps_the_invariants(program, expandable, capacity):
    allocator = CachingAllocator(capacity, expandable)
    live = run(program, allocator, assert_consistent)
    for block_id in live:
        allocator.free(block_id)
        assert_consistent(allocator)
    allocator.empty_cache()
    assert allocator.allocated_bytes == 0
    assert allocator.reserved_bytes == 0


@settings(max_examples=40, deadline=None)
@given(program=programs, expandable=st.booleans())
def test_the_same_program_gives_the_same_figures(program, expandable):
    first, second = CachingAllocator(None, expandable), CachingAllocator(None, expandable)
    run(program, first)
    run(program, second)
    assert first.live_ranges() == second.live_ranges()
    assert first.max_reserved_bytes == second.max_reserved_bytes


@settings(max_examples=40, deadline=None)
@given(program=programs, expandable=st.booleans())
def test_a_device_as_large_as_the_peak_never_runs_out(program, expandable):
    unlimited = CachingAllocator(None, expandable)
    run(program, unlimited)
    limited = CachingAllocator(unlimited.max_reserved_bytes, expandable)
    run(program, limited)
    assert limited.live_ranges() == unlimited.live_ranges()
