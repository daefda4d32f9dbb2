"""The most likely tokens of each row, in an order that leaves nothing to chance."""

from __future__ import annotations

import torch
from torch import Tensor

_ID_BITS = 32
_ID_MASK = (1 << _ID_BITS) - 1


def top_tokens(logits: Tensor, count: int) -> Tensor:
    """The ids of the `count` most likely tokens, in falling order; of equals the lowest id first.

    `torch.topk` alone takes any of equal values, and picks its algorithm by the size of the batch; logits that come
    from bfloat16 are full of equals. So each value carries its id in the low half of an int64: no two are equal.

    Args:
        logits: float32 [rows, vocabulary].
        count: at most the vocabulary.

    Returns:
        int64 [rows, count].
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: a negative zero is a zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as int32 in the order of the floats
    last = logits.shape[-1] - 1
    reversed_ids = torch.arange(last, -1, -1, device=logits.device)
    keys = (ordered.long() << _ID_BITS) | reversed_ids
    return last - (keys.topk(count, dim=-1).values & _ID_MASK)
