"""Draws against their distribution; each row's alone, whatever is beside it."""

from __future__ import annotations

import pytest
import torch

from loramux_kernels import counter_uniform, draw_filtered, draw_unsorted
from loramux_kernels.draw import ONE, draw, token_weights

VOCAB = 1000


def column(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)[:, None]


def chi_square(drawn: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Over the standard deviation of its distribution: above 4 means that the draws are of another one."""
    expected = probabilities * len(drawn)
    observed = torch.bincount(drawn, minlength=len(probabilities))
    assert not observed[probabilities == 0].any(), "a token that is forbidden was drawn"
    common = expected >= 5
    rare, rare_expected = observed[~common].sum(), expected[~common].sum()
    statistic = ((observed - expected)[common] ** 2 / expected[common]).sum()
    statistic += (rare - rare_expected) ** 2 / rare_expected.clamp(min=1)
    freedom = int(common.sum())
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


def uniform_of(num: int, seed: int) -> torch.Tensor:
    return counter_uniform(torch.full((num,), seed), torch.arange(num))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("min_p", [0.0, 0.02])
def test_unsorted_draws_follow_the_distribution(temperature, min_p):
    n = 20_000
    logits = torch.randn(60, generator=torch.Generator().manual_seed(1)) * 2
    probabilities = (logits.double() / temperature).softmax(-1)
    probabilities[probabilities < min_p * probabilities.max()] = 0
    drawn = draw_unsorted(logits.expand(n, -1), column([temperature] * n), uniform_of(n, 7), column([min_p] * n))
    assert chi_square(drawn, probabilities / probabilities.sum()) < 4


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(8, 1.0, 0.0), (0, 0.8, 0.0), (20, 0.9, 0.05)])
def test_filtered_draws_follow_the_distribution(top_k, top_p, min_p):
    n = 20_000
    logits = torch.randn(60, generator=torch.Generator().manual_seed(2)) * 2
    kept = logits.double().sort(descending=True)
    probabilities = kept.values.softmax(-1)
    if top_k:
        probabilities[top_k:] = 0
        probabilities /= probabilities.sum()
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    probabilities[probabilities < min_p * probabilities[0]] = 0
    dense = torch.zeros(60, dtype=torch.float64).scatter(0, kept.indices, probabilities / probabilities.sum())
    columns = (column([top_k] * n, torch.int64), column([top_p] * n), column([min_p] * n))
    drawn = draw_filtered(logits.expand(n, -1), column([1.0] * n), uniform_of(n, 8), *columns, most=top_k or 60)
    assert chi_square(drawn, dense) < 4


def test_a_row_is_drawn_alike_alone_and_in_any_batch():
    n = 64
    g = torch.Generator().manual_seed(3)
    logits = (torch.randn(n, VOCAB, generator=g) * 3).bfloat16().float()  # full of equals
    temperature = column([0.3 + 0.02 * i for i in range(n)])
    uniform = uniform_of(n, 9)
    top_k = torch.randint(1, 60, (n, 1), generator=g)
    top_p = torch.rand(n, 1, generator=g, dtype=torch.float64)
    min_p = torch.rand(n, 1, generator=g, dtype=torch.float64) * 0.2

    def both(rows: slice, most: int) -> torch.Tensor:
        common = (logits[rows], temperature[rows], uniform[rows])
        filters = (top_k[rows], top_p[rows], min_p[rows])
        return torch.stack([draw_unsorted(*common, min_p[rows]), draw_filtered(*common, *filters, most)])

    together = both(slice(0, n), 60)
    for size in (1, 3, 31):
        for most in (60, 100, VOCAB):
            pieces = [both(slice(start, start + size), most) for start in range(0, n, size)]
            assert torch.equal(torch.cat(pieces, dim=1), together)


def test_the_smallest_temperature_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.999, -1e30, float("-inf")]] * 50)
    assert (draw_unsorted(logits, column([1e-30] * 50), uniform_of(50, 1)) == 1).all()


def test_weights_are_probabilities_over_the_largest():
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(4)) * 4
    weights = token_weights(logits, column([0.8] * 5)).double()
    assert (weights.amax(-1) == ONE).all()
    probabilities = (logits.double() / 0.8).softmax(-1)
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), probabilities, rtol=0, atol=1e-6)


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("vocab", [1, 2, 5, 300_000])
def test_the_ends_of_the_interval_draw_allowed_tokens(edge, vocab):
    weights = torch.full((1, vocab), ONE)
    weights[:, 3:] = 0
    place = draw(weights, torch.tensor([edge], dtype=torch.float64)).item()
    assert place == (0 if edge == 0 else min(vocab, 3) - 1)
    full = torch.full((1, vocab), ONE)
    assert draw(full, torch.tensor([edge], dtype=torch.float64)).item() == (0 if edge == 0 else vocab - 1)


def test_logits_that_are_not_numbers_lead_nowhere_else():
    logits = torch.full((3, VOCAB), float("nan"))
    logits[1, 5:] = 1.0
    logits[2] = float("-inf")
    columns = (column([0] * 3, torch.int64), column([0.9] * 3), column([0.1] * 3))
    for drawn in (
        draw_unsorted(logits, column([1.0] * 3), uniform_of(3, 1)),
        draw_filtered(logits, column([1.0] * 3), uniform_of(3, 1), *columns, most=VOCAB),
    ):
        assert ((drawn >= 0) & (drawn < VOCAB)).all()
