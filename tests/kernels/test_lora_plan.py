"""Dividing the LoRA work of a step: every row, every part, once; and never more than there is room for."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loramux_kernels.lora import PARTS, WHOLE
from loramux_kernels.lora_plan import LARGE_RANK, NO_ADAPTER, Segment, divide, lora_units

RANKS = np.array([8, LARGE_RANK, LARGE_RANK + 1, 256], np.int32)
LARGE = (2, 3)

slots = st.lists(st.integers(NO_ADAPTER, len(RANKS) - 1), min_size=1, max_size=24)


@given(adapters=slots, spare=st.integers(0, 100))
def test_units_are_each_row_and_then_further_parts(adapters: list[int], spare: int) -> None:
    rows = len(adapters)
    units = lora_units(np.array(adapters, np.int32), RANKS, rows + spare)
    assert units.dtype == np.int32
    assert len(units) <= rows + spare
    assert (units[:rows] // 32).tolist() == list(range(rows)), "a row's first unit is at its own place"
    large = [row for row, slot in enumerate(adapters) if slot in LARGE]
    divided = large[: spare // (PARTS - 1)]
    expected = Counter((row, part) for row in divided for part in range(PARTS))
    expected.update((row, WHOLE) for row in range(rows) if row not in divided)
    assert Counter((unit // 32, unit % 32) for unit in units.tolist()) == expected
    assert all(unit % 32 not in (0, WHOLE) for unit in units[rows:].tolist()), "behind the rows are parts alone"


@given(adapters=slots, lengths=st.data(), spare=st.integers(0, 100))
def test_segments_are_divided_in_place(adapters: list[int], lengths: st.DataObject, spare: int) -> None:
    segments, start = [], 0
    for slot in adapters:
        end = start + lengths.draw(st.integers(1, 16))
        segments.append(Segment(start, end, slot))
        start = end
    divided = divide(segments, RANKS, len(segments) + spare)
    assert len(divided) <= len(segments) + spare
    large = [segment for segment in segments if segment.slot in LARGE][: spare // (PARTS - 1)]
    expected: list[Segment] = []
    for segment in segments:
        parts = range(PARTS) if segment in large else [WHOLE]
        expected += [segment._replace(part=part) for part in parts]
    assert divided == expected


def test_without_large_ranks_nothing_changes() -> None:
    segments = [Segment(0, 3, NO_ADAPTER), Segment(3, 4, 0), Segment(4, 20, 1)]
    assert divide(segments, RANKS, 1000) == segments
    assert lora_units(np.array([NO_ADAPTER, 0, 1], np.int32), RANKS, 1000).tolist() == [WHOLE, 32 + WHOLE, 64 + WHOLE]
