"""Rotation of queries and keys in Triton: a program a row and key-value head, with the query heads that share it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loramux_kernels.backend import pdl
from loramux_kernels.rotary import RotaryLayer


@triton.jit
def rotated_heads(
    qkv, cos, sin, query_gain, key_gain, t, head, position, T, rows,
    NH: tl.constexpr, NKV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PIECES: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """float32 halves of the rotated queries [rows, HALF] of a kv head, of its key [HALF], and its value halves.

    `rows` numbers the query heads, repeating them where there are more rows than heads. To be called after the wait.
    """
    G: tl.constexpr = NH // NKV
    WIDTH: tl.constexpr = (NH + 2 * NKV) * D
    H2: tl.constexpr = D // 2
    d = tl.arange(0, HALF)
    inside = d < H2
    q_at = (head * G + rows % G)[:, None] * D + d[None, :]
    k_at, v_at = (NH + head) * D + d, (NH + NKV + head) * D + d
    q1 = tl.zeros((rows.shape[0], HALF), tl.float32)
    q2 = tl.zeros((rows.shape[0], HALF), tl.float32)
    k1, k2 = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    v1, v2 = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    for piece in tl.static_range(PIECES):
        y = qkv + (piece * T + t).to(tl.int64) * WIDTH
        q1 += tl.load(y + q_at, mask=inside[None, :], other=0.0).to(tl.float32)
        q2 += tl.load(y + q_at + H2, mask=inside[None, :], other=0.0).to(tl.float32)
        k1 += tl.load(y + k_at, mask=inside, other=0.0).to(tl.float32)
        k2 += tl.load(y + k_at + H2, mask=inside, other=0.0).to(tl.float32)
        v1 += tl.load(y + v_at, mask=inside, other=0.0).to(tl.float32)
        v2 += tl.load(y + v_at + H2, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        qs = tl.rsqrt((tl.sum(q1 * q1, 1) + tl.sum(q2 * q2, 1)) / D + EPS)
        q1 = q1 * qs[:, None] * tl.load(query_gain + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        q2 = q2 * qs[:, None] * tl.load(query_gain + H2 + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        ks = tl.rsqrt((tl.sum(k1 * k1, 0) + tl.sum(k2 * k2, 0)) / D + EPS)
        k1 = k1 * ks * tl.load(key_gain + d, mask=inside, other=0.0).to(tl.float32)
        k2 = k2 * ks * tl.load(key_gain + H2 + d, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + position * H2 + d, mask=inside, other=0.0)
    s = tl.load(sin + position * H2 + d, mask=inside, other=0.0)
    qa, qb = q1 * c[None, :] - q2 * s[None, :], q2 * c[None, :] + q1 * s[None, :]
    return qa, qb, k1 * c - k2 * s, k2 * c + k1 * s, v1, v2


@triton.jit(do_not_specialize=["T"])
def _rotate_and_store(
    qkv, positions, cos, sin, query_gain, key_gain, key_cache, value_cache, slot_mapping, out, T,
    NH: tl.constexpr, NKV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PIECES: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head, t = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    position, slot = tl.load(positions + t), tl.load(slot_mapping + t).to(tl.int64)
    if PDL:
        gdc_wait()
    G: tl.constexpr = NH // NKV
    H2: tl.constexpr = D // 2
    rows, d = tl.arange(0, ROWS), tl.arange(0, HALF)
    qa, qb, ka, kb, va, vb = rotated_heads(
        qkv, cos, sin, query_gain, key_gain, t, head, position, T, rows, NH, NKV, D, HALF, PIECES, NORM, EPS
    )
    inside = d < H2
    dtype = out.dtype.element_ty
    o = out + (t.to(tl.int64) * NH + head * G + rows)[:, None] * D + d[None, :]
    tl.store(o, qa.to(dtype), mask=(rows < G)[:, None] & inside[None, :])
    tl.store(o + H2, qb.to(dtype), mask=(rows < G)[:, None] & inside[None, :])
    at = ((slot // BLOCK_SIZE * NKV + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * D + d
    tl.store(key_cache + at, ka.to(dtype), mask=inside)
    tl.store(key_cache + at + H2, kb.to(dtype), mask=inside)
    tl.store(value_cache + at, va.to(dtype), mask=inside)
    tl.store(value_cache + at + H2, vb.to(dtype), mask=inside)


def launch(
    qkv: Tensor,
    positions: Tensor,
    layer: RotaryLayer,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    out: Tensor,
) -> None:
    """Write `out` [rows, heads, head_dim] and the caches."""
    use_pdl = pdl(out.device)
    num_rows = out.shape[0]
    _rotate_and_store[(layer.num_kv_heads, num_rows)](
        qkv,
        positions,
        layer.cos,
        layer.sin,
        *gains(layer),
        key_cache,
        value_cache,
        slot_mapping,
        out,
        num_rows,
        **constants(layer),
        ROWS=triton.next_power_of_2(layer.num_heads // layer.num_kv_heads),
        BLOCK_SIZE=key_cache.shape[2],
        PIECES=qkv.shape[0],
        PDL=use_pdl,
        num_warps=1,
        launch_pdl=use_pdl,
    )


def gains(layer: RotaryLayer) -> tuple[Tensor, Tensor]:
    """The gains of the head norms, or any tensors where there are none."""
    if layer.query_gain is None or layer.key_gain is None:
        return layer.cos, layer.cos
    return layer.query_gain, layer.key_gain


def constants(layer: RotaryLayer) -> dict[str, int | float | bool]:
    """What kernels that call `rotated_heads` are compiled for."""
    return {
        "NH": layer.num_heads,
        "NKV": layer.num_kv_heads,
        "D": layer.head_dim,
        "HALF": max(16, triton.next_power_of_2(layer.head_dim // 2)),  # tl.dot takes 16 at least
        "NORM": layer.query_gain is not None,
        "EPS": layer.eps,
    }
