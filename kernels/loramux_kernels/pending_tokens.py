"""Input tokens of a step, some of which the step before is still to sample.

    out[i] = sampled[sources[i]]  where sources[i] ≥ 0,  else ids[i]

So a step can be launched before the host knows the tokens that it begins with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loramux_kernels.backend import runs_triton


def pending_tokens(ids: Tensor, sources: Tensor, sampled: Tensor) -> Tensor:
    """ids, sources: int32 [rows]; sampled: int64 [any]. Returns int64 [rows]."""
    if not runs_triton(ids):
        return torch.where(sources >= 0, sampled[sources.clamp(min=0).long()], ids.long())
    from loramux_kernels import pending_tokens_triton

    out = torch.empty(ids.shape, dtype=torch.int64, device=ids.device)
    pending_tokens_triton.launch(ids, sources, sampled, out)
    return out
