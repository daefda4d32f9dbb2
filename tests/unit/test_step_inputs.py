"""Where the inputs of a step lie: apart from each other, at the same place each time, behind one copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramux_worker.engine.block_tables import BlockTables
from loramux_worker.engine.inputs import InputBuffers, StepInputs, StepShape
from loramux_worker.engine.protocol import SamplingParameters
from loramux_worker.engine.sequence import Sequence

LARGEST = StepShape(64, 16, segments=64)
MOST_UPDATES = 8
CPU = torch.device("cpu")

shapes = st.builds(
    StepShape,
    tokens=st.integers(1, 64),
    sequences=st.integers(1, 16),
    segments=st.just(0) | st.integers(1, 64),
    rows_in_segment=st.just(16),
    divided=st.booleans(),
    most_query_tokens=st.sampled_from([1, 9]),
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def spans(inputs: StepInputs, buffer: torch.Tensor) -> dict[str, range]:
    """The elements of the device's buffer that each input takes."""
    first = {name: (view.data_ptr() - buffer.data_ptr()) // 4 for name, view in inputs.device.items()}
    return {name: range(at, at + inputs.device[name].numel()) for name, at in first.items()}


@given(shape=shapes)
def test_inputs_lie_apart_and_inside_what_is_copied(shape: StepShape) -> None:
    buffers = InputBuffers(LARGEST, MOST_UPDATES, CPU)
    inputs = buffers.begin(shape)
    taken = spans(inputs, buffers.device)
    assert {name: len(span) for name, span in taken.items()} == shape.sizes
    elements = [element for span in taken.values() for element in span]
    assert len(set(elements)) == len(elements)
    assert max(elements) < inputs.used <= buffers._updates_at
    assert all(span.start % 4 == 0 for span in taken.values() if len(span)), "for loads of four at once"
    for number, values in enumerate(inputs.host.values()):
        values[:] = number + 1
    for number, values in enumerate(inputs.host.values()):
        assert (values == number + 1).all()


@given(shape=shapes, others=st.lists(shapes, max_size=4))
def test_a_shape_has_its_addresses_for_good(shape: StepShape, others: list[StepShape]) -> None:
    buffers = InputBuffers(LARGEST, MOST_UPDATES, CPU)
    tables = BlockTables(2, 2, 0, CPU)
    captured = {name: view.data_ptr() for name, view in buffers.static(shape).device.items()}
    for other in others:
        buffers.send(buffers.begin(other), tables)
    again = buffers.begin(StepShape(*(getattr(shape, name) for name in StepShape.__slots__)))
    assert {name: view.data_ptr() for name, view in again.device.items()} == captured


def test_what_was_filled_in_is_on_the_device(device: torch.device) -> None:
    buffers, tables = InputBuffers(LARGEST, MOST_UPDATES, device), BlockTables(2, 2, 0, device)
    for step in range(7):  # more than there are buffers on the host
        shape = StepShape(5 + step, 3, segments=step % 3, rows_in_segment=16, divided=step % 2 > 0, most_query_tokens=9)
        inputs = buffers.begin(shape)
        expected = {}
        for number, (name, values) in enumerate(inputs.host.items()):
            values[:] = np.arange(len(values)) + 1000 * step + 100 * number
            expected[name] = values.tolist()
        buffers.send(inputs, tables)
        assert {name: view.tolist() for name, view in inputs.device.items()} == expected
        attention, lora = inputs.attention(tables.device), inputs.lora_rows()
        assert attention.query_starts.tolist() == expected["query_starts"]
        assert attention.slot_mapping.tolist() == expected["slot_mapping"]
        assert attention.most_query_tokens == 9
        assert lora.slots.tolist() == expected["adapters"]
        assert lora.divided == shape.divided
        assert (lora.segments is None) == (shape.segments == 0)
        assert (lora.units is None) == (lora.num_units is None) == (shape.units == 0)
        if lora.units is not None and lora.num_units is not None:
            assert lora.units.tolist() == expected["units"]
            assert lora.num_units.tolist() == expected["num_units"]
        if lora.segments is not None:
            assert lora.segments.flatten().tolist() == expected["segments"]
            assert lora.segments.shape == (4, shape.segments)
            assert lora.most_in_segment == 16


def test_buffers_on_the_host_take_turns(device: torch.device) -> None:
    """One that is being copied is not filled again."""
    buffers, tables = InputBuffers(LARGEST, MOST_UPDATES, device), BlockTables(2, 2, 0, device)
    shape = StepShape(4, 4)
    addresses = []
    for _ in range(7):
        inputs = buffers.begin(shape)
        addresses.append(inputs.host["ids"].ctypes.data)
        buffers.send(inputs, tables)
    assert len(set(addresses[:3])) == 3
    assert addresses == [addresses[i % 3] for i in range(7)]


@pytest.mark.parametrize("num_blocks", [1, 6, pytest.param(40, marks=pytest.mark.gpu)])
def test_new_blocks_are_sent_with_the_inputs(num_blocks: int) -> None:
    """40 are more than go in one copy, and that waits for the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "meta")
    tables = BlockTables(3, 40, 99, device)
    if device.type == "meta":  # a device of its own, in our memory
        device, tables.device = CPU, torch.from_numpy(tables.host.copy())
    buffers = InputBuffers(LARGEST, MOST_UPDATES, device)
    for step in range(5):
        sequence = Sequence(step, [1], SamplingParameters(1), block_table=list(range(step, step + num_blocks)))
        inputs = buffers.begin(StepShape(2, 2))
        inputs.host["ids"][:] = 5, 6
        row = tables.row_of(sequence)
        buffers.send(inputs, tables)
        assert tables.device[row, :num_blocks].tolist() == sequence.block_table
        assert tables.device.tolist() == tables.host.tolist()
        assert inputs.device["ids"].tolist() == [5, 6], "and the inputs are not touched"
        if step % 2:
            tables.release(sequence)
