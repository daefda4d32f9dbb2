"""Which graph a step gets: one that has room, of its kind, and no larger than need be. No graph is captured here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramux_kernels.lora import PARTS
from loramux_worker.engine.graphs import ROWS_IN_SEGMENT, SPARE_SEGMENTS, GraphKey, StepGraphs, prefers_segments
from loramux_worker.engine.inputs import InputBuffers, StepShape

LIMITS = [(256, 2048), (16, 64), (1, 16), (7, 40), (600, 600), (300, 100), (4, 8)]


def make_graphs(most_sequences: int, most_tokens: int) -> StepGraphs:
    """As after `capture`, which takes a GPU."""

    def never(key: GraphKey) -> torch.Tensor:
        raise AssertionError(key)

    graphs = StepGraphs(never, never, most_sequences, most_tokens)
    graphs._graphs = dict.fromkeys(graphs._keys())  # type: ignore[arg-type]
    return graphs


GRAPHS = {limits: make_graphs(*limits) for limits in LIMITS}


@given(data=st.data(), limits=st.sampled_from(LIMITS), decode=st.booleans())
def test_a_graph_has_room_for_its_step(data: st.DataObject, limits: tuple[int, int], decode: bool) -> None:
    graphs, (most_sequences, most_tokens) = GRAPHS[limits], limits
    sequences = data.draw(st.integers(1, min(limits)), "sequences")
    if decode or sequences == most_tokens:
        tokens, most_query_tokens = sequences, 1
    else:
        tokens = data.draw(st.integers(sequences + 1, most_tokens), "tokens")
        most_query_tokens = data.draw(st.integers(2, tokens - sequences + 1), "most_query_tokens")
    segments = data.draw(st.integers(0, tokens), "segments")
    divided = segments > 0 and data.draw(st.booleans(), "divided")
    key = graphs.find(tokens, sequences, segments, most_query_tokens, divided=divided)
    if key is None:
        assert most_query_tokens > 1, "there is one for every decode step"
        assert tokens > max((k.shape.tokens for k in graphs._graphs if not k.shape.is_decode), default=0)
        return
    shape = key.shape
    assert shape.tokens >= tokens
    assert sequences <= shape.sequences <= max(most_sequences, shape.tokens)
    assert shape.most_query_tokens >= most_query_tokens
    assert shape.is_decode == (most_query_tokens == 1)
    assert key.lora == (segments > 0)
    assert shape.divided == divided
    if divided and not shape.segments:
        assert shape.units >= tokens + PARTS - 1, "one row at least can be divided"
    if shape.segments:
        assert shape.segments >= segments + (SPARE_SEGMENTS if divided else 0)
        assert shape.rows_in_segment == ROWS_IN_SEGMENT
    smaller = [k.shape.tokens for k in graphs._graphs if k.shape.is_decode == shape.is_decode]
    assert not [rows for rows in smaller if tokens <= rows < shape.tokens]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_every_graph_fits_into_the_buffers(limits: tuple[int, int]) -> None:
    most_sequences, most_tokens = limits[0], max(limits)  # as the runner makes them
    largest = StepShape(most_tokens, most_sequences, segments=most_tokens + SPARE_SEGMENTS)
    buffers = InputBuffers(largest, 8, torch.device("cpu"))
    for key in GRAPHS[limits]._graphs:
        assert buffers.begin(key.shape).used <= buffers._updates_at
        assert key.shape.tokens <= most_tokens
        assert key.shape.sequences <= most_sequences
        assert key.shape.segments <= largest.segments


def test_the_largest_is_captured_first() -> None:
    rows = [key.shape.tokens for key in GRAPHS[256, 2048]._keys()]
    assert rows == sorted(rows, reverse=True)
    assert len(set(GRAPHS[256, 2048]._keys())) == len(rows)


def test_what_was_not_captured_is_not_found() -> None:
    graphs = StepGraphs(lambda key: None, lambda key: torch.empty(0), 16, 64)
    assert len(graphs) == 0
    assert graphs.find(4, 4, 0, 1, divided=False) is None


@pytest.mark.parametrize(
    ("tokens", "segments", "expected"),
    [(1, 1, False), (8, 1, False), (16, 16, False), (16, 1, True), (64, 8, True), (64, 40, False), (2048, 128, True)],
)
def test_segments_where_few_adapters_serve_many_rows(tokens: int, segments: int, expected: bool) -> None:
    assert prefers_segments(tokens, segments) is expected


@given(tokens=st.integers(1, 4096), segments=st.integers(1, 512))
def test_fewer_segments_never_speak_for_rows(tokens: int, segments: int) -> None:
    if prefers_segments(tokens, segments + 1):
        assert prefers_segments(tokens, segments)
    if prefers_segments(tokens, segments):
        assert prefers_segments(tokens + 1, segments)
