"""Drawing in Triton: a program a row, which looks for the cut of its filters instead of sorting.

Floats are compared as their images: int32 in the same order. The cut that top-k or top-p make is found by a search
among the images, each pass of which takes the exact measure (tokens or weight) of what is at or above some of them.

Weights take float64, of which a pass over a whole row has too much. So the filters work on candidates: the tokens at or
above a floor that some thousands exceed, copied together, still in the order of the vocabulary. In a flat row, or for a
large top-k, the cut may lie below the floor: then they work on the row itself, by the same code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux_kernels.draw import LEAST_TEMPERATURE, ONE

_BLOCK = 4096  # tokens at a time
_SEARCHED = 1024  # the same in a search, which holds each beside all of its limits
_CAPACITY = 8192  # candidates that are kept of a row, at least a block

_ONE, _LEAST_TEMPERATURE = tl.constexpr(ONE), tl.constexpr(LEAST_TEMPERATURE)
_LOWEST = tl.constexpr(-0x7F800001)  # image of minus infinity
_HIGHEST = tl.constexpr(0x7F800000)  # image of infinity
_NOTHING = tl.constexpr(-0x7F800002)  # image of what is past the end of a row
_LIMITS = tl.constexpr(8)  # images that a pass of the search tries


@triton.jit
def _flip(bits):
    """Bits of a float to its image, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _images(logits, at, n):
    """Images of the logits at those places; what is not a number counts as minus infinity."""
    x = tl.load(logits + at, mask=at < n, other=0.0)
    image = _flip(tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True))  # a negative zero is a zero
    image = tl.where((image < _LOWEST) | (image > _HIGHEST), _LOWEST, image)
    return tl.where(at < n, image, _NOTHING)


@triton.jit
def _weights(image, best, inverse):
    """Weights int64 as in `token_weights`; `best` is the row's largest image, `inverse` that of its temperature."""
    # an infinity is never taken from itself: that would not be a number
    logit = _flip(tl.minimum(tl.maximum(image, _LOWEST), _HIGHEST - 1)).to(tl.float32, bitcast=True)
    peak = _flip(tl.where(best > _LOWEST, best, 0)).to(tl.float32, bitcast=True)
    weight = (tl.exp((logit - peak).to(tl.float64) * inverse) * _ONE).to(tl.int64)
    return tl.where(image == best, _ONE, weight)


@triton.jit
def _measures(logits, n, limits, best, inverse, WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """What is at or above each limit: tokens, or their weight. int64 like `limits` [_LIMITS]."""
    measures = tl.zeros((_LIMITS,), tl.int64)
    for start in range(0, n, BLOCK):
        image = _images(logits, start + tl.arange(0, BLOCK), n)
        above = image[None, :] >= limits.to(tl.int32)[:, None]
        if WEIGHT:
            measures += tl.sum(tl.where(above, _weights(image, best, inverse)[None, :], 0), 1)
        else:
            measures += tl.sum(above.to(tl.int32), 1)
    return measures


@triton.jit
def _cut(logits, n, low, target, best, inverse, WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """The highest image, from `low` to `best`, with at least `target` (float64) at or above it; and what is above it.

    All that is at or above `low` must be enough. Sums are compared as float64, as torch compares them.
    """
    low = low.to(tl.int64)
    high = best.to(tl.int64) + 1  # where it is not enough
    more = tl.full((), 0, tl.int64)  # what is at or above `high`
    while high - low > 1:
        limits = low + (high - low) * (tl.arange(0, _LIMITS) + 1) // (_LIMITS + 1)
        measures = _measures(logits, n, limits, best, inverse, WEIGHT, BLOCK)
        enough = measures.to(tl.float64) >= target
        more = tl.max(tl.where(enough, more, measures), 0)  # the nearer to `low`, the more
        high = tl.min(tl.where(enough, high, limits), 0)
        low = tl.max(tl.where(enough, limits, low), 0)
    return low.to(tl.int32), more


@triton.jit
def _equals(weight, more, target, most):
    """How many tokens of the cut's `weight` stay beside what is above it: until `target` is reached, at least one."""
    low = tl.full((), 0, tl.int64)
    high = low + most
    while high - low > 1:
        middle = (low + high) // 2
        enough = (more + middle * weight).to(tl.float64) >= target
        low = tl.where(enough, low, middle)
        high = tl.where(enough, middle, high)
    return high


@triton.jit
def _kept(logits, at, n, cut, end, least, best, inverse):
    """Weights of the tokens at those places, 0 where forbidden: equals of the cut stay in the places before `end`."""
    image = _images(logits, at, n)
    weight = _weights(image, best, inverse)
    stays = (image > cut) | ((image == cut) & (at < end))
    return tl.where(stays & (weight.to(tl.float64) >= least), weight, 0)


@triton.jit
def _measure(logits, at, n, cut, end, least, best, inverse, WEIGHT: tl.constexpr):
    """What a token counts: int64, its weight if it stays; else 1 if it is an equal of the cut."""
    if WEIGHT:
        measure = _kept(logits, at, n, cut, end, least, best, inverse)
    else:
        measure = (_images(logits, at, n) == cut).to(tl.int64)
    return measure


@triton.jit
def _place(logits, n, threshold, cut, end, least, best, inverse, WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """The first place whose running sum of `_measure` exceeds `threshold`; n or more if none does."""
    offsets = tl.arange(0, BLOCK)
    start, before = 0, tl.full((), 0, tl.int64)
    measure = _measure(logits, offsets, n, cut, end, least, best, inverse, WEIGHT)
    here = tl.sum(measure, 0)
    while (before + here <= threshold) & (start + BLOCK < n):
        before += here
        start += BLOCK
        measure = _measure(logits, start + offsets, n, cut, end, least, best, inverse, WEIGHT)
        here = tl.sum(measure, 0)
    return start + tl.sum((before + tl.cumsum(measure, 0) <= threshold).to(tl.int32), 0)


@triton.jit
def _total(logits, n, cut, end, least, best, inverse, BLOCK: tl.constexpr):
    """The weight of all that `_kept` leaves."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, n, BLOCK):
        total += _kept(logits, start + tl.arange(0, BLOCK), n, cut, end, least, best, inverse)
    return tl.sum(total, 0)


@triton.jit
def _survey(logits, scratch, V: tl.constexpr, BLOCK: tl.constexpr, SEARCHED: tl.constexpr):
    """The row's largest image, and a floor under its candidates that `BLOCK // 2` tokens or some more reach.

    Of the largest of each lane's tokens, half reach the floor; so do, by chance, more of the lanes' other tokens.
    """
    offsets = tl.arange(0, BLOCK)
    lanes = tl.full((BLOCK,), _NOTHING, tl.int32)
    for start in range(0, V, BLOCK):
        lanes = tl.maximum(lanes, _images(logits, start + offsets, V))
    tl.store(scratch + offsets, _flip(lanes).to(tl.float32, bitcast=True))
    tl.debug_barrier()  # other threads of the program read it
    best, lowest = tl.max(lanes, 0), tl.full((), _LOWEST, tl.int32)
    floor, _ = _cut(scratch, BLOCK, lowest, BLOCK // 2, best, 1.0, False, SEARCHED)
    tl.debug_barrier()
    return best, floor


@triton.jit
def _gather(
    logits, floor, candidates, ids, best, inverse, weighs, V: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr
):
    """Copy logits and ids of what reaches the floor. How many do, and if `weighs` the weight of the whole row."""
    count, total = 0, tl.zeros((BLOCK,), tl.int64)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        image = _images(logits, at, V)
        if weighs:
            total += tl.where(at < V, _weights(image, best, inverse), 0)
        reaches = image >= floor
        place = count + tl.cumsum(reaches.to(tl.int32), 0) - 1
        stored = reaches & (place < CAPACITY)
        tl.store(candidates + place, _flip(image).to(tl.float32, bitcast=True), mask=stored)
        tl.store(ids + place, at, mask=stored)
        count += tl.sum(reaches.to(tl.int32), 0)
    tl.debug_barrier()  # other threads of the program read them
    return count, tl.sum(total, 0)


@triton.jit
def _filter(logits, n, low, total, top_k, top_p, best, inverse, SEARCHED: tl.constexpr, BLOCK: tl.constexpr):
    """The cut of top-k and top-p, and before which place its equals stay; `total` is the row's without top-k."""
    cut, equals = low, tl.full((), 0, tl.int64) + n
    if top_k > 0:
        target = top_k.to(tl.float64)
        cut, more = _cut(logits, n, low, target, best, inverse, False, SEARCHED)
        equals = _equals(1, more, target, n)
        if top_p < 1:
            total = _total(logits, n, cut, 0, 0.0, best, inverse, BLOCK) + equals * _weights(cut, best, inverse)
    if top_p < 1:
        target = top_p * total.to(tl.float64)
        cut, more = _cut(logits, n, cut, target, best, inverse, True, SEARCHED)
        equals = _equals(_weights(cut, best, inverse), more, target, n)
    return cut, _place(logits, n, equals, cut, 0, 0.0, best, inverse, False, BLOCK)


@triton.jit
def _draw_tokens(
    logits, temperature, uniform, top_k, top_p, min_p, candidates, ids, out,
    V: tl.constexpr, BLOCK: tl.constexpr, SEARCHED: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k, p, u = tl.load(top_k + row), tl.load(top_p + row), tl.load(uniform + row)
    k = tl.where(k < V, k, 0)
    inverse = 1.0 / tl.maximum(tl.load(temperature + row), _LEAST_TEMPERATURE)
    least = tl.load(min_p + row) * _ONE
    logits += row * V
    candidates += row * CAPACITY
    ids += row * CAPACITY
    best, floor = _survey(logits, candidates, V, BLOCK, SEARCHED)
    source, n, copied = logits, V, False
    cut, end = tl.full((), _LOWEST, tl.int32), V
    if (k > 0) | (p < 1):
        count, total = _gather(logits, floor, candidates, ids, best, inverse, k == 0, V, BLOCK, CAPACITY)
        if count <= CAPACITY:
            if k > 0:
                copied = k <= count
            else:
                weight = _total(candidates, count, _NOTHING, 0, 0.0, best, inverse, BLOCK)
                copied = weight.to(tl.float64) >= p * total.to(tl.float64)
        if copied:
            source, n, cut = candidates, count, floor
        cut, end = _filter(source, n, cut, total, k, p, best, inverse, SEARCHED, BLOCK)
    total = _total(source, n, cut, end, least, best, inverse, BLOCK)
    threshold = tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)  # the product may be rounded up
    token = _place(source, n, threshold, cut, end, least, best, inverse, True, BLOCK)
    token = tl.minimum(token, n - 1)
    if copied:
        token = tl.load(ids + token)
    tl.store(out + row, token.to(tl.int64))


def launch(
    logits: Tensor, temperature: Tensor, uniform: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, out: Tensor
) -> None:
    """Write `out` int64 [rows]."""
    rows, vocabulary = logits.shape
    candidates = logits.new_empty(rows, _CAPACITY)
    ids = torch.empty_like(candidates, dtype=torch.int32)
    block = min(_BLOCK, triton.next_power_of_2(vocabulary))
    _draw_tokens[(rows,)](
        logits,
        temperature,
        uniform,
        top_k,
        top_p,
        min_p,
        candidates,
        ids,
        out,
        V=vocabulary,
        BLOCK=block,
        SEARCHED=min(_SEARCHED, block),
        CAPACITY=_CAPACITY,
        num_warps=16 if block >= 4096 else 4,
    )
