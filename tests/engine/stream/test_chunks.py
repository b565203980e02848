"""The partition: every element exactly once, contiguous, cut on rows only, balanced."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from chunkplan.engine import InputError, ParameterStream
from chunkplan.engine.stream.chunks import ParameterInfo, partition
from tests.support.families import tiny_model

SHAPES = st.one_of(
    st.just(()),
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 40), st.integers(1, 12)),
    st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
)
STREAMS = st.lists(st.tuples(SHAPES, st.sampled_from([2, 4])), min_size=1, max_size=12).map(
    lambda items: [ParameterInfo(f"p{i}", shape, size) for i, (shape, size) in enumerate(items)]
)


def rows_of(stream):
    return sum(info.num_rows for info in stream)


@st.composite
def streams_and_counts(draw):
    stream = draw(STREAMS)
    return stream, draw(st.integers(1, rows_of(stream)))


@given(streams_and_counts())
@settings(max_examples=300, deadline=None)
def test_every_element_lies_in_exactly_one_chunk_in_stream_order(case):
    stream, count = case
    chunks = partition(stream, count)
    pieces = [piece for chunk in chunks for piece in chunk.slices]
    assert [chunk.index for chunk in chunks] == list(range(count))
    position = [0] * len(stream)
    for piece in pieces:
        assert piece.start == position[piece.index], "a gap or an overlap"
        assert piece.stop > piece.start
        position[piece.index] = piece.stop
    assert position == [info.numel for info in stream]
    assert [piece.index for piece in pieces] == sorted(piece.index for piece in pieces)


@given(streams_and_counts())
@settings(max_examples=300, deadline=None)
def test_only_the_first_and_last_tensor_of_a_chunk_are_cut_and_only_between_rows(case):
    stream, count = case
    for chunk in partition(stream, count):
        assert chunk.num_parameters > 0
        for place, piece in enumerate(chunk.slices):
            info = stream[piece.index]
            if piece.numel < info.numel:
                assert place in (0, len(chunk.slices) - 1)
                assert len(info.shape) > 1
                assert piece.start % info.row_numel == 0
                assert piece.stop % info.row_numel == 0


@given(streams_and_counts())
@settings(max_examples=300, deadline=None)
def test_sizes_differ_from_the_fair_share_by_at_most_one_row(case):
    stream, count = case
    fair = sum(info.num_bytes for info in stream) / count
    largest_row = max(info.row_numel * info.itemsize for info in stream)
    if largest_row > fair:
        return  # a row above the fair share cannot be shared: then only the other properties hold
    for chunk in partition(stream, count):
        num_bytes = sum(piece.numel * stream[piece.index].itemsize for piece in chunk.slices)
        assert abs(num_bytes - fair) <= largest_row


@given(STREAMS, st.sampled_from([-1, 0, "rows + 1", 10**9]))
def test_a_count_that_rows_cannot_satisfy_is_refused_by_name(stream, count):
    count = rows_of(stream) + 1 if count == "rows + 1" else count
    with pytest.raises(InputError) as refused:
        partition(stream, count)
    assert refused.value.field == "training.schedule.num_chunks"
    assert f"between 1 and {rows_of(stream)}" in refused.value.message


def test_a_large_embedding_is_spread_over_chunks():
    stream = ParameterStream(tiny_model("llama", vocab_size=1000))
    chunks = stream.partition(16)
    holders = [chunk for chunk in chunks if any(piece.index == 0 for piece in chunk.slices)]
    assert len(holders) > 4
    sizes = [chunk.num_parameters for chunk in chunks]
    assert max(sizes) - min(sizes) <= 2 * 24  # a row of the widest matrix


def test_tied_weights_appear_once_under_their_first_name():
    tied, untied = ParameterStream(tiny_model("llama-tied")), ParameterStream(tiny_model("llama"))
    assert "lm_head.weight" not in tied.names
    assert untied.names[-1] == "lm_head.weight"
    assert tied.num_parameters == untied.num_parameters - 97 * 16
    assert tied.num_bytes == 4 * tied.num_parameters


def test_experts_are_cut_between_experts():
    model = nn.Module()
    model.experts = nn.Parameter(torch.zeros(4, 3, 5))
    pieces = [chunk.slices[0] for chunk in ParameterStream(model).partition(4)]
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 15), (15, 30), (30, 45), (45, 60)]
    with pytest.raises(InputError):
        ParameterStream(model).partition(5)
