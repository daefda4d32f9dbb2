"""Drawing a token, each row with its own temperature and filters.

A row's token must depend on the row alone, on every device, but sums of floats depend on the order in which they are
added, which a device chooses by the size of the batch. So probabilities are whole numbers here, `ONE` for the most
likely token: their sums are exact in any order.

Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020 (top-p); Nguyen et al., "Turning Up the
Heat: Min-p Sampling", ICLR 2025 (min-p).
"""

from __future__ import annotations

import torch
from torch import Tensor

from loramux_kernels.top_tokens import top_tokens

ONE = 1 << 43
"""Weight of the most likely token: a million tokens of it fit an int64. What is 1e-13 as likely is never drawn."""


def draw_unsorted(logits: Tensor, temperature: Tensor, uniform: Tensor, min_p: Tensor | None = None) -> Tensor:
    """Draw from rows without top-k and top-p, which need no order of the vocabulary.

    Args:
        logits: float32 [rows, vocabulary].
        temperature: float64 [rows, 1], above 0.
        uniform: float64 [rows] in [0, 1).
        min_p: float64 [rows, 1], 0 = off; None: off for all.

    Returns:
        token ids int64 [rows].
    """
    weights = token_weights(logits, temperature)
    if min_p is not None:
        weights = weights.masked_fill(weights < min_p * ONE, 0)
    return draw(weights, uniform)


def draw_filtered(
    logits: Tensor, temperature: Tensor, uniform: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, most: int
) -> Tensor:
    """Draw from the `most` most likely tokens of each row, as its filters allow.

    Fewer than the vocabulary are selected, not sorted: `most` should be small where every row has a small top-k.

    Args:
        logits: float32 [rows, vocabulary].
        temperature, top_p, min_p: float64 [rows, 1], see `apply_filters`.
        uniform: float64 [rows] in [0, 1).
        top_k: int64 [rows, 1]; 0, off, only where `most` is the vocabulary.
        most: at least each row's top-k.

    Returns:
        token ids int64 [rows].
    """
    if most < logits.shape[-1]:
        token_ids = top_tokens(logits, most)
        ordered = logits.gather(-1, token_ids)
    else:
        ordered, token_ids = logits.sort(dim=-1, descending=True, stable=True)
    weights = apply_filters(token_weights(ordered, temperature), top_k, top_p, min_p)
    return token_ids.gather(-1, draw(weights, uniform)[:, None])[:, 0]


def token_weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities as whole numbers, `ONE` for the most likely token.

    Args:
        logits: float32 [rows, n].
        temperature: float64 [rows, 1], above 0.

    Returns:
        int64 [rows, n].
    """
    distance = logits - logits.amax(-1, keepdim=True)
    return (distance / temperature).exp_().mul_(ONE).long()  # float64 from the division on


def apply_filters(weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Leave out what each row's filters forbid; the most likely token always stays.

    Args:
        weights: int64 [rows, n] in falling order, `ONE` first.
        top_k: int64 [rows, 1], 0 = off.
        top_p, min_p: float64 [rows, 1], 1 and 0 = off.

    Returns:
        int64 [rows, n], 0 where forbidden.
    """
    rank = torch.arange(weights.shape[-1], device=weights.device)
    weights = weights.masked_fill((top_k > 0) & (rank >= top_k), 0)
    cumulative = weights.cumsum(-1)
    before = cumulative - weights
    # the filters follow one another: min-p compares with the best token, which no filter removes
    forbidden = (top_p < 1) & (before >= top_p * cumulative[:, -1:])
    forbidden |= weights < min_p * ONE
    forbidden[:, 0] = False
    return weights.masked_fill(forbidden, 0)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Inverse transform: the first place whose cumulative weight passes the row's random number.

    Args:
        weights: int64 [rows, n], not negative, of a sum above 0.
        uniform: float64 [rows] in [0, 1).

    Returns:
        places int64 [rows] in [0, n), of a weight above 0.
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    threshold = torch.minimum((uniform[:, None] * total).long(), total - 1)  # the product may be rounded up
    places = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return places.clamp_(max=weights.shape[-1] - 1)  # logits that are not numbers must not lead outside
