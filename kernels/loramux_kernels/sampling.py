"""What is done to logits before a token is chosen, and the choice that needs no draw.

Order as in Hugging Face's `generate`: penalties, temperature, then the filters top-k, top-p and min-p, then one
draw (`draw.py`). Keskar et al., "CTRL", 2019, section 4.1 (repetition penalty).
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 1e30


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row; of equals the lowest id.

    Straight from the serving dtype: converting [256, 128256] logits to float32 first would cost more than this does.

    Args:
        logits: any float dtype [rows, vocabulary].

    Returns:
        int64 [rows].
    """
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        return torch.from_numpy(logits.numpy().argmax(-1))  # the same, some ten times as fast
    return logits.argmax(-1)


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
