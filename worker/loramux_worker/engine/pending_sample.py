"""Tokens that the device is going to have sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from loramux_worker.engine.protocol import TokenLogprobs
from loramux_worker.engine.transfers import download, record_event


class SampledToken(NamedTuple):
    """The next token of one sequence, with its log-probabilities where they were asked for."""

    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class PendingLogprobs:
    """Log-probabilities of some rows, on the host when the sample is there.

    `rows` of the sample, and how many of the best tokens each of them `wanted`; `chosen` float32 [n] of the sampled
    token; `top` float32 [n, most] and `top_ids` int64 [n, most] of the best ones.
    """

    rows: list[int]
    wanted: list[int]
    chosen: Tensor
    top: Tensor
    top_ids: Tensor

    def read(self) -> dict[int, TokenLogprobs]:
        """By row of the sample. To be called when the device is done."""
        chosen: list[float] = self.chosen.tolist()
        top, ids = self.top.tolist(), self.top_ids.tolist()
        return {
            row: TokenLogprobs(chosen[i], list(zip(ids[i][:n], top[i][:n], strict=True)))
            for i, (row, n) in enumerate(zip(self.rows, self.wanted, strict=True))
        }


class PendingSample:
    """One token a row: `token_ids` int64 [rows] on the device at once, on the host after `wait`.

    Made when everything was enqueued: its copies to the host and its event come behind that.
    """

    def __init__(self, token_ids: Tensor, logprobs: list[PendingLogprobs] | None = None) -> None:
        self.token_ids = token_ids
        self._logprobs = logprobs or []
        self._host_ids = download(token_ids)
        self._done = record_event(token_ids.device)

    def wait(self) -> list[SampledToken]:
        """Wait for the device; the token of each row."""
        if self._done is not None:
            self._done.synchronize()
        token_ids: list[int] = self._host_ids.tolist()
        logprobs = {row: read for pending in self._logprobs for row, read in pending.read().items()}
        return [SampledToken(token, logprobs.get(row)) for row, token in enumerate(token_ids)]
