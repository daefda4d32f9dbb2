"""Draws against their distribution; each row's alone, whatever is beside it."""

from __future__ import annotations

import pytest
import torch

from loramux_kernels import counter_uniform, draw_tokens
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


def draw_alike(logits, uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Rows that all have the same parameters."""
    temperatures, top_ps, min_ps = (torch.full_like(uniform, x) for x in (temperature, top_p, min_p))
    return draw_tokens(logits, temperatures, uniform, torch.full((len(uniform),), top_k), top_ps, min_ps)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("min_p", [0.0, 0.02])
def test_unfiltered_draws_follow_the_distribution(temperature, min_p):
    n = 20_000
    logits = torch.randn(60, generator=torch.Generator().manual_seed(1)) * 2
    probabilities = (logits.double() / temperature).softmax(-1)
    probabilities[probabilities < min_p * probabilities.max()] = 0
    drawn = draw_alike(logits.expand(n, -1), uniform_of(n, 7), temperature, min_p=min_p)
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
    drawn = draw_alike(logits.expand(n, -1), uniform_of(n, 8), 1.0, top_k, top_p, min_p)
    assert chi_square(drawn, dense) < 4


def test_a_row_is_drawn_alike_alone_and_in_any_batch():
    n = 64
    g = torch.Generator().manual_seed(3)
    logits = (torch.randn(n, VOCAB, generator=g) * 3).bfloat16().float()  # full of equals
    arguments = (
        logits,
        torch.linspace(0.3, 1.6, n, dtype=torch.float64),
        uniform_of(n, 9),
        torch.randint(1, 60, (n,), generator=g) * (torch.arange(n) % 2),
        torch.rand(n, generator=g, dtype=torch.float64),
        torch.rand(n, generator=g, dtype=torch.float64) * 0.2,
    )
    together = draw_tokens(*arguments)
    for size in (1, 3, 31):
        pieces = [draw_tokens(*(t[start : start + size] for t in arguments)) for start in range(0, n, size)]
        assert torch.equal(torch.cat(pieces), together)


def test_what_the_filters_leave_is_drawn_in_the_order_of_the_vocabulary():
    logits = torch.tensor([[1.0, 3.0, 0.0, 2.0, 3.0]]).expand(5, -1)
    uniform = torch.tensor([0.0, 0.4, 0.45, 0.55, 0.999], dtype=torch.float64)  # 3, 2 and 3 have 0.42, 0.16 and 0.42
    assert draw_alike(logits, uniform, top_k=3).tolist() == [1, 1, 3, 3, 4]
    assert draw_alike(logits, uniform, top_p=0.5).tolist() == [1, 1, 1, 4, 4]
    assert draw_alike(logits, uniform, min_p=0.9).tolist() == [1, 1, 1, 4, 4]


def test_the_smallest_temperature_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.999, -1e30, float("-inf")]] * 50)
    for temperature in (1e-30, 1e-320):  # the reciprocal of the latter is infinite
        assert (draw_alike(logits, uniform_of(50, 1), temperature) == 1).all()


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
    for top_p in (1.0, 0.9):
        drawn = draw_alike(logits, uniform_of(3, 1), top_p=top_p, min_p=0.1)
        assert ((drawn >= 0) & (drawn < VOCAB)).all()
