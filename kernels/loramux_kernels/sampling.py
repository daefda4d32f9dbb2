"""Choosing the next token of every row, each row with its own parameters.

Order as in Hugging Face's `generate`: penalties, temperature, then the filters top-k, top-p and min-p, then one
draw. Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020 (top-p); Nguyen et al., "Turning Up
the Heat: Min-p Sampling", ICLR 2025 (min-p); Keskar et al., "CTRL", 2019, section 4.1 (repetition penalty).
"""

from __future__ import annotations

import torch
from torch import Tensor

_NEVER = float("-inf")
_LARGEST = 1e30


def apply_penalties(
    logits: Tensor, seen: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Make tokens that were used before less likely.

    Args:
        logits: float32 [rows, vocabulary].
        seen: bool [rows, vocabulary], tokens of prompt or generated text (repetition penalty).
        counts: int32 [rows, vocabulary], how often a token was generated (presence and frequency penalties).
        repetition, presence, frequency: float32 [rows, 1].
    """
    penalised = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(seen, penalised, logits)
    # a penalty may be so small that float32 ends: the filters must not meet an infinity
    return (logits - frequency * counts - presence * (counts > 0)).clamp(-_LARGEST, _LARGEST)


def apply_filters(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row and leave out what its filters forbid; the most likely token always stays.

    Args:
        logits: float32 [rows, vocabulary], temperature applied.
        top_k: int64 [rows, 1], 0 = off.
        top_p, min_p: float32 [rows, 1], 1 and 0 = off.

    Returns:
        probabilities float32 [rows, vocabulary] in falling order, not renormalised, 0 where forbidden;
        token ids int64 [rows, vocabulary] in that order.
    """
    ordered, token_ids = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    ordered = ordered.masked_fill((top_k > 0) & (rank >= top_k), _NEVER)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # the filters follow one another: min-p compares with the best token, which no filter removes
    forbidden = (top_p < 1) & (before >= top_p)  # rounding may carry the sum past 1
    forbidden |= probabilities < min_p * probabilities[:, :1]
    forbidden[:, 0] = False
    return probabilities.masked_fill(forbidden, 0.0), token_ids


def sample(probabilities: Tensor, token_ids: Tensor, uniform: Tensor) -> Tensor:
    """Inverse transform: the first token whose cumulative probability passes the row's random number.

    Args:
        probabilities: float32 [rows, vocabulary] in the order of `token_ids`, need not sum to 1.
        token_ids: int64 [rows, vocabulary].
        uniform: float64 [rows] in [0, 1).

    Returns:
        int64 [rows].
    """
    cumulative = probabilities.double().cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, threshold, right=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return token_ids.gather(-1, torch.minimum(chosen, last))[:, 0]
