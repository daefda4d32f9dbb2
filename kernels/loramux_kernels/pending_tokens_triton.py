"""Input tokens in Triton: the first kernel of a step."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256


@triton.jit(do_not_specialize=["T"])
def _pending_tokens(ids, sources, sampled, out, T, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources + i, mask=i < T, other=-1)
    known = tl.load(ids + i, mask=i < T, other=0).to(tl.int64)
    late = tl.load(sampled + source, mask=source >= 0, other=0)
    tl.store(out + i, tl.where(source >= 0, late, known), mask=i < T)


def launch(ids: Tensor, sources: Tensor, sampled: Tensor, out: Tensor) -> None:
    """Write `out` int64 [rows]."""
    rows = out.shape[0]
    _pending_tokens[(triton.cdiv(rows, _BLOCK),)](ids, sources, sampled, out, rows, BLOCK=_BLOCK, num_warps=4)
