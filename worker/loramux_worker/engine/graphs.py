"""CUDA graphs of steps: one launch instead of some hundred.

A graph has a fixed shape and reads everything else from tensors at fixed addresses: which adapters, which blocks, how
long. So one serves every mix; a smaller step is padded, its spare rows written to a block that nobody owns.
"""

from __future__ import annotations

import gc
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import structlog
import torch
from torch import Tensor

from loramux_worker.engine.inputs import StepShape

log = structlog.get_logger(__name__)

_DECODE_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_MIXED_ROWS = (32, 96, 160, 256, 512)
ROWS_IN_SEGMENT = 16  # tokens of one adapter that a program of the LoRA kernels takes in a small step
_SHARE, _FEW = (
    4,
    8,
)  # LoRA by segment is better than row by row from so many rows of an adapter on average, above so few

SPARE_SEGMENTS = 60  # so that the work of four segments of large rank can be divided


@dataclass(frozen=True, slots=True)
class GraphKey:
    """A shape, and whether adapters are computed."""

    shape: StepShape
    lora: bool


class StepGraphs:
    """Graphs of decode steps and of small mixed ones, in buckets of rows.

    `prepare` fills the static inputs of a shape with padding; `run` computes a step from them and returns its logits,
    which are only valid until the next graph runs, since all share their memory.
    """

    def __init__(
        self,
        prepare: Callable[[GraphKey], None],
        run: Callable[[GraphKey], Tensor],
        most_sequences: int,
        most_tokens: int,
    ) -> None:
        self._prepare = prepare
        self._run = run
        self._most_sequences = most_sequences
        self._decode_rows = _up_to(_DECODE_ROWS, most_sequences)
        self._mixed_rows = _up_to(_MIXED_ROWS, min(most_tokens, _MIXED_ROWS[-1]))
        self._graphs: dict[GraphKey, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.seconds = 0.0
        self.num_bytes = 0
        self.last: GraphKey | None = None  # what ran last

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(self) -> None:
        """Capture all, the largest first, so that the smaller fit into its memory."""
        gc.collect()
        gc.disable()  # a graph of an engine before that is collected during a capture breaks it
        try:
            self._capture_all()
        finally:
            gc.enable()

    def _capture_all(self) -> None:
        torch.cuda.empty_cache()  # what was freed before is not to be counted
        started, (free, _) = time.monotonic(), torch.cuda.mem_get_info()
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        for key in self._keys():
            self._prepare(key)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._run(key)  # compiles what is not compiled yet
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                logits = self._run(key)
            self._graphs[key] = graph, logits
        torch.cuda.synchronize()
        self.seconds = time.monotonic() - started
        self.num_bytes = max(0, free - torch.cuda.mem_get_info()[0])
        log.info("graphs_captured", graphs=len(self), seconds=round(self.seconds, 1), bytes=self.num_bytes)

    def replay(self, key: GraphKey) -> Tensor:
        """Run a step; its logits [rows of the shape, vocabulary]."""
        graph, logits = self._graphs[key]
        self.last = key
        graph.replay()
        return logits

    def find(
        self, tokens: int, sequences: int, segments: int, most_query_tokens: int, *, divided: bool
    ) -> GraphKey | None:
        """The smallest graph that has room; None when there is none.

        `segments`: runs of rows with one adapter, cut to `ROWS_IN_SEGMENT`; 0 when no row has an adapter. `divided`:
        an adapter's rank is large.
        """
        decode = most_query_tokens == 1
        buckets = self._decode_rows if decode else self._mixed_rows
        index = bisect_left(buckets, tokens)
        if index == len(buckets):
            return None
        by_segment = segments > 0 and prefers_segments(tokens, segments)
        plain = self._plain(buckets[index], decode=decode)
        key = GraphKey(_with_lora(plain, by_segment=by_segment, divided=divided), lora=segments > 0)
        if sequences > key.shape.sequences or key not in self._graphs:
            return None
        return key

    def _plain(self, rows: int, *, decode: bool) -> StepShape:
        if decode:
            return StepShape(rows, rows)
        return StepShape(rows, min(rows, self._most_sequences), most_query_tokens=rows)

    def _keys(self) -> Sequence[GraphKey]:
        keys = []
        for decode, buckets in ((False, self._mixed_rows), (True, self._decode_rows)):
            for rows in buckets:
                plain = self._plain(rows, decode=decode)
                ways = [(s, d) for s in (False, True) for d in (False, True) if not s or rows > _FEW]
                shapes = [_with_lora(plain, by_segment=s, divided=d) for s, d in ways]
                keys += [GraphKey(plain, lora=False), *(GraphKey(shape, lora=True) for shape in shapes)]
        return sorted(keys, key=lambda key: -key.shape.tokens)


def _with_lora(plain: StepShape, *, by_segment: bool, divided: bool) -> StepShape:
    if not by_segment:
        return replace(plain, divided=divided)
    segments = plain.tokens // _SHARE + (SPARE_SEGMENTS if divided else 0)
    return replace(plain, segments=segments, rows_in_segment=ROWS_IN_SEGMENT, divided=divided)


def prefers_segments(tokens: int, segments: int) -> bool:
    """Whether LoRA by segment is better than row by row: few adapters serve many rows."""
    return tokens > _FEW and tokens >= _SHARE * segments


def _up_to(buckets: Sequence[int], most: int) -> list[int]:
    """The buckets below `most`, and `most` itself."""
    return [rows for rows in buckets if rows < most] + [most]
