"""A step that the device has been given, and how the next step takes tokens from it that the host has not read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from loramux_worker.engine.pending_sample import PendingSample, SampledToken
from loramux_worker.engine.sequence import PENDING_TOKEN, Sequence
from loramux_worker.scheduler.step import Chunk


class InFlightStep:
    """A step between its launch and the reading of its tokens.

    It samples a token for each of `sequences`, those that caught up in it; the others only read a chunk of their
    prompt. `rows` has the row of each sequence id among what it samples.
    """

    def __init__(self, sequences: list[Sequence], sample: PendingSample) -> None:
        self.sequences = sequences
        self.rows = {sequence.sequence_id: row for row, sequence in enumerate(sequences)}
        self._places = [len(sequence.generated_token_ids) for sequence in sequences]
        self._sample = sample

    def append_placeholders(self) -> None:
        """Give each of its sequences a `PENDING_TOKEN`, so that all see how many tokens there are."""
        for sequence in self.sequences:
            sequence.generated_token_ids.append(PENDING_TOKEN)

    def tokens(self) -> list[SampledToken]:
        """Wait until the device is done with the step; the token of each of `sequences`."""
        return self._sample.wait()

    def place(self, row: int) -> int:
        """The index in its `generated_token_ids` of what the row's sequence was given."""
        return self._places[row]


class PendingInputs(NamedTuple):
    """Input tokens of a packed batch that only the device knows: `positions` in the batch, `rows` of the last step."""

    positions: list[int]
    rows: list[int]


def pending_inputs(chunks: Iterable[Chunk], previous: InFlightStep | None) -> PendingInputs:
    """Which inputs of the packed batch of `chunks` are placeholders, and which rows of `previous` have the tokens.

    A placeholder is the last token of its sequence, which has been advanced up to it: so it is all of a chunk. With
    one step in flight, it is that step which samples it.
    """
    positions: list[int] = []
    rows: list[int] = []
    end = 0
    for sequence, num_tokens in chunks:
        end += num_tokens
        generated = sequence.generated_token_ids
        if generated and generated[-1] == PENDING_TOKEN:
            assert previous is not None
            assert num_tokens == sequence.num_uncomputed_tokens == 1
            positions.append(end - 1)
            rows.append(previous.rows[sequence.sequence_id])
    return PendingInputs(positions, rows)
