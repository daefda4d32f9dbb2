"""Drawing a token, each row with its own temperature and filters.

    weight_t = ⌊2⁴³ · exp((logit_t − max) / temperature)⌋          token = the first whose running sum of the weights
                                                                   that the filters leave exceeds uniform · their sum

A row's token must depend on the row alone, on every device, but sums of floats depend on the order in which they are
added, which a device chooses by the size of the batch. So probabilities are whole numbers here, `ONE` for the most
likely token: their sums are exact in any order. What the filters leave is what they leave of the tokens in falling
order, of equals the lowest id first; the draw then goes through them in the order of the vocabulary. So an
implementation needs to know where to cut, but not to sort.

Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020 (top-p); Nguyen et al., "Turning Up the
Heat: Min-p Sampling", ICLR 2025 (min-p).
"""

from __future__ import annotations

import torch
from torch import Tensor

from loramux_kernels.backend import runs_triton

ONE = 1 << 43
"""Weight of the most likely token: a million tokens of it fit an int64. What is 1e-13 as likely is never drawn."""

LEAST_TEMPERATURE = 1e-300
"""Its reciprocal is a number; a smaller one is as greedy."""

_FEW_ROWS = 8
"""A GPU sorts so few while one program searches a peaked row, and in a tenth of what it takes to search a flat one."""


def draw_tokens_reference(
    logits: Tensor, temperature: Tensor, uniform: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """In torch, in the shape of `draw_tokens`, for as many rows as its temporaries (40 bytes a logit) allow."""
    top_k, top_p, min_p = top_k[:, None], top_p[:, None], min_p[:, None]
    weights = token_weights(logits, temperature[:, None])
    if ((top_k > 0) | (top_p < 1)).any():
        weights = filter_sorted(logits, weights, top_k, top_p, min_p)
    else:
        weights = weights.masked_fill(weights < min_p * ONE, 0)
    return draw(weights, uniform)


def draw_tokens(
    logits: Tensor, temperature: Tensor, uniform: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """Draw a token for each row.

    Args:
        logits: float32 [rows, vocabulary], contiguous.
        temperature: float64 [rows], above 0.
        uniform: float64 [rows] in [0, 1).
        top_k: int64 [rows], 0 = off.
        top_p, min_p: float64 [rows], 1 and 0 = off.

    Returns:
        token ids int64 [rows]; any of the vocabulary for a row whose logits are not numbers.
    """
    if not runs_triton(logits):
        return draw_tokens_reference(logits, temperature, uniform, top_k, top_p, min_p)
    if logits.is_cuda and logits.shape[0] <= _FEW_ROWS:
        return draw_sorted(logits, temperature, uniform, top_k, top_p, min_p)
    from loramux_kernels import draw_triton

    out = torch.empty_like(top_k)
    draw_triton.launch(logits, temperature, uniform, top_k, top_p, min_p, out)
    return out


def draw_sorted(
    logits: Tensor, temperature: Tensor, uniform: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The reference, without its question whether there is anything to sort for, for which the host would wait."""
    weights = token_weights(logits, temperature[:, None])
    return draw(filter_sorted(logits, weights, top_k[:, None], top_p[:, None], min_p[:, None]), uniform)


def token_weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities as whole numbers, `ONE` for the most likely token.

    Args:
        logits: float32 [rows, n].
        temperature: float64 [rows, 1], above 0.

    Returns:
        int64 [rows, n].
    """
    distance = logits - logits.amax(-1, keepdim=True)
    inverse = temperature.clamp(min=LEAST_TEMPERATURE).reciprocal()
    return (distance * inverse).exp_().mul_(ONE).long()  # float64 from the product on


def filter_sorted(logits: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """`apply_filters` for weights int64 [rows, n] in the order of the vocabulary, as `logits` are."""
    token_ids = logits.argsort(dim=-1, descending=True, stable=True)
    return weights.scatter(-1, token_ids, apply_filters(weights.gather(-1, token_ids), top_k, top_p, min_p))


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
