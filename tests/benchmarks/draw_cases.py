"""What `bench_kernels.py` times: draws from logits of a model's vocabulary, beside torch, which sorts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from kernel_cases import Case, Shape, copies
from torch import Tensor

from loramux_kernels import draw_tokens
from loramux_kernels.draw import draw_sorted

# name, standard deviation of the logits, top-k, top-p. The first leaves some hundred tokens, flat logits half of all.
_FILTERS = (
    ("top-p 0.9", 4.0, 0, 0.9),
    ("top-k 50", 4.0, 50, 1.0),
    ("none", 4.0, 0, 1.0),
    ("top-p 0.9, flat", 1.0, 0, 0.9),
)


def draw_cases(shape: Shape, rows: Sequence[int]) -> Iterator[Case]:
    """Every row with the same filters, over logits that a model in bfloat16 could have made."""
    for num_rows in rows:
        for name, std, top_k, top_p in _FILTERS:
            yield _draw_case(shape, f"{name}, {num_rows} rows", num_rows, std, top_k, top_p)


def _draw_case(shape: Shape, name: str, rows: int, std: float, top_k: int, top_p: float) -> Case:
    def column(value: float) -> Tensor:
        return torch.full((rows,), value, dtype=torch.float64, device=shape.device)

    num_bytes = 4 * rows * shape.vocabulary
    uniform = torch.rand(rows, dtype=torch.float64, device=shape.device)
    columns = (column(1.0), uniform, column(top_k).long(), column(top_p), column(0.0))
    logits = [shape.random(rows, shape.vocabulary, std=std).float() for _ in range(copies(num_bytes, least=2))]

    def error() -> float:
        return float((draw_tokens(logits[0], *columns) != draw_sorted(logits[0], *columns)).double().mean())

    library: list[Callable[[], object]] = [partial(draw_sorted, x, *columns) for x in logits]
    return Case(name, [partial(draw_tokens, x, *columns) for x in logits], num_bytes, error, library=library)
