"""Sampling ops against Hugging Face's logits processors."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loramux_kernels import apply_penalties, counter_uniform, greedy, top_tokens
from loramux_kernels.draw import apply_filters, token_weights

VOCAB = 50


def column(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)[:, None]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 1.0, 0.0),
        (5, 1.0, 0.0),
        (0, 0.7, 0.0),
        (0, 1.0, 0.2),
        (7, 0.8, 0.05),
        (1, 0.1, 0.9),
        (100, 0.999, 0.001),
    ],
)
def test_filters_keep_what_hugging_face_keeps(top_k, top_p, min_p):
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(20, VOCAB, generator=g) * 3
    expected = logits.clone()
    ids = torch.zeros(20, 1, dtype=torch.int64)
    if top_k:
        expected = TopKLogitsWarper(min(top_k, VOCAB))(ids, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(ids, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(ids, expected)
    rows = 20
    ordered, token_ids = logits.sort(dim=-1, descending=True)
    weights = apply_filters(
        token_weights(ordered, column([1.0] * rows, torch.float64)),
        column([top_k] * rows, torch.int64),
        column([top_p] * rows, torch.float64),
        column([min_p] * rows, torch.float64),
    )
    dense = torch.zeros(rows, VOCAB).scatter(1, token_ids, weights.float())
    dense = dense / dense.sum(-1, keepdim=True)
    torch.testing.assert_close(dense, expected.softmax(-1), atol=1e-6, rtol=1e-4)


def test_each_row_has_its_own_filters():
    weights = token_weights(torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 3), column([1.0] * 3, torch.float64))
    kept = apply_filters(
        weights,
        column([2, 0, 0], torch.int64),
        column([1.0, 0.5, 1.0], torch.float64),
        column([0.0, 0.0, 0.0], torch.float64),
    )
    assert (kept > 0).sum(-1).tolist() == [2, 1, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_greedy_takes_the_lowest_of_equals(dtype):
    g = torch.Generator().manual_seed(4)
    logits = torch.randint(-3, 3, (50, 1000), generator=g).to(dtype)
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert greedy(logits).tolist() == expected


@pytest.mark.parametrize("count", [0, 1, 7, 40])
def test_top_tokens_are_those_of_a_stable_sort(count):
    g = torch.Generator().manual_seed(5)
    logits = torch.cat(
        [
            torch.randint(-2, 3, (20, 40), generator=g) * 0.5,  # equals everywhere, and zeros of both signs
            torch.randn(20, 40, generator=g) * 1e30,
            torch.randn(20, 40, generator=g).masked_fill(torch.rand(20, 40, generator=g) < 0.5, float("-inf")),
        ]
    )
    logits[:10] = logits[:10] * -1.0
    expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(top_tokens(logits, count), expected)


def test_repetition_penalty_is_hugging_faces():
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(4, VOCAB, generator=g)
    ids = torch.randint(VOCAB, (4, 9), generator=g)
    seen = torch.zeros(4, VOCAB, dtype=torch.bool).scatter(1, ids, True)
    none = torch.zeros(4, VOCAB, dtype=torch.int32)
    out = apply_penalties(logits, seen, none, column([1.3] * 4), column([0.0] * 4), column([0.0] * 4))
    torch.testing.assert_close(out, RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone()))


def test_presence_and_frequency_penalties_count_generated_tokens():
    logits = torch.zeros(1, 4)
    counts = torch.tensor([[0, 1, 3, 0]], dtype=torch.int32)
    out = apply_penalties(logits, counts > 0, counts, column([1.0]), column([0.5]), column([0.25]))
    torch.testing.assert_close(out, torch.tensor([[0.0, -0.75, -1.25, 0.0]]))


def test_uniform_depends_on_its_pair_alone():
    seeds = torch.tensor([1, 2, 2**62, 0])
    positions = torch.tensor([5, 5, 9, 0])
    together = counter_uniform(seeds, positions)
    alone = torch.cat([counter_uniform(s[None], p[None]) for s, p in zip(seeds, positions, strict=True)])
    assert torch.equal(together, alone)
    assert len(set(together.tolist())) == 4


def test_uniform_is_uniform_over_seeds_and_positions():
    n = 50_000
    for seeds, positions in (
        (torch.arange(n), torch.full((n,), 3)),
        (torch.full((n,), 3), torch.arange(n)),
        (torch.arange(n), torch.arange(n)),
    ):
        u = counter_uniform(seeds, positions)
        assert u.min() >= 0
        assert u.max() < 1
        histogram = torch.histc(u, 20, 0, 1)
        chi_square = ((histogram - n / 20) ** 2 / (n / 20)).sum()
        assert chi_square < 45  # 19 degrees of freedom: p ≈ 0.0007
        assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.02
