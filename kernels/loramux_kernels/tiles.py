"""Tiles of the matrix products, by shape: measured where it matters, a sane rule elsewhere.

The tables hold what was fastest inside a whole decode step on an H200 (tiles that win alone may lose in the step, where
early launched programs share the multiprocessors). Nothing is tuned while serving.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowsTile:
    """A product of some rows: `columns` × `inner` of the weight at a time, K in `split` pieces.

    `swap` computes W·xᵀ instead of x·Wᵀ, which puts the weight on the long side of the tensor cores' tile.
    """

    columns: int
    inner: int
    split: int
    swap: bool
    stages: int
    warps: int


@dataclass(frozen=True, slots=True)
class VectorTile:
    """A product of one row: `columns` rows of the weight a program, `inner` elements of K at a time."""

    columns: int
    inner: int
    warps: int


_MOST_ROWS = 128  # beyond, the vendor's library is as good

# (N, K, gated) → by most rows. N of a gated product counts one half. None: the vendor's library.
_ROWS: dict[tuple[int, int, bool], dict[int, RowsTile | None]] = {
    # Llama 3.1 8B: qkv, o, gate and up, down, head
    (6144, 4096, False): {
        16: RowsTile(64, 256, 1, True, 4, 8),
        32: RowsTile(64, 128, 1, True, 5, 8),
        64: RowsTile(64, 128, 1, False, 6, 4),
        128: None,
    },
    (4096, 4096, False): {
        16: RowsTile(64, 256, 2, True, 5, 8),
        32: RowsTile(128, 64, 4, True, 6, 8),
        64: RowsTile(64, 128, 2, True, 5, 4),
        128: RowsTile(64, 64, 2, True, 8, 8),
    },
    (14336, 4096, True): {
        16: RowsTile(64, 128, 1, True, 4, 4),
        32: RowsTile(64, 128, 1, True, 4, 4),
        64: RowsTile(128, 64, 1, True, 4, 8),
        128: RowsTile(128, 64, 1, True, 4, 8),
    },
    (4096, 14336, False): {
        16: RowsTile(64, 64, 4, True, 8, 8),
        32: RowsTile(128, 64, 4, True, 6, 4),
        64: RowsTile(64, 256, 2, False, 3, 4),
        128: RowsTile(64, 64, 2, True, 8, 8),
    },
    (128256, 4096, False): {
        16: RowsTile(64, 128, 1, True, 6, 4),
        32: RowsTile(128, 128, 1, False, 4, 4),
        64: RowsTile(128, 128, 1, True, 4, 8),
        128: None,
    },
    # TinyLlama 1.1B
    (2560, 2048, False): {
        16: RowsTile(128, 64, 4, True, 6, 8),
        64: RowsTile(64, 128, 2, True, 5, 4),
        128: None,
    },
    (2048, 2048, False): {
        16: RowsTile(64, 128, 4, True, 6, 4),
        32: RowsTile(64, 128, 4, False, 8, 8),
        64: RowsTile(32, 256, 2, False, 4, 8),
        128: RowsTile(64, 64, 4, True, 8, 4),
    },
    (5632, 2048, True): {
        32: RowsTile(64, 128, 1, True, 4, 4),
        64: RowsTile(64, 64, 1, False, 5, 4),
        128: RowsTile(64, 128, 1, True, 3, 8),
    },
    (2048, 5632, False): {
        32: RowsTile(64, 128, 4, True, 8, 8),
        64: RowsTile(64, 128, 4, True, 6, 8),
        128: RowsTile(64, 64, 4, False, 8, 8),
    },
    (32000, 2048, False): {
        16: RowsTile(128, 128, 1, True, 3, 4),
        32: RowsTile(128, 128, 1, False, 4, 4),
        64: RowsTile(128, 64, 1, False, 3, 4),
        128: RowsTile(64, 64, 1, True, 4, 4),
    },
}

_VECTOR: dict[tuple[int, int, bool], VectorTile] = {
    (6144, 4096, False): VectorTile(4, 1024, 4),
    (4096, 4096, False): VectorTile(4, 2048, 8),
    (14336, 4096, True): VectorTile(2, 2048, 8),
    (4096, 14336, False): VectorTile(16, 1024, 8),
    (128256, 4096, False): VectorTile(4, 2048, 8),
}


def rows_tile(num_rows: int, columns: int, inner: int, *, gated: bool, shared_memory: int) -> RowsTile | None:
    """The tile for x [num_rows, inner] · Wᵀ; None: leave it to the vendor's library.

    Args:
        shared_memory: bytes that one program may have on this GPU.
    """
    if num_rows > _MOST_ROWS:
        return None
    tile = _measured(num_rows, columns, inner, gated) or _by_rule(num_rows, columns, inner, gated)
    if tile is None or inner % (tile.inner * tile.split):
        return None
    return _fit(tile, num_rows, gated, shared_memory)


def vector_tile(columns: int, inner: int, *, gated: bool) -> VectorTile | None:
    """The tile for one row; None when K does not divide into any."""
    if (tile := _VECTOR.get((columns, inner, gated))) is not None:
        return tile
    step = next((step for step in (2048, 1024, 512, 256, 128) if inner % step == 0), None)
    return None if step is None else VectorTile(2 if gated else 4, step, 8 if step >= 2048 else 4)


def _measured(num_rows: int, columns: int, inner: int, gated: bool) -> RowsTile | None:
    for most, tile in _ROWS.get((columns, inner, gated), {}).items():
        if num_rows <= most:
            return tile
    return None


def _by_rule(num_rows: int, columns: int, inner: int, gated: bool) -> RowsTile | None:
    """One wave of programs: narrow tiles, and K split where the columns alone do not fill the GPU."""
    if (columns, inner, gated) in _ROWS or num_rows > 64:
        return None
    step = next((step for step in (128, 64, 32, 16) if inner % step == 0), None)
    if step is None:
        return None
    split = 1
    while not gated and split < 4 and columns // 64 * split < 100 and inner % (step * split * 2) == 0:
        split *= 2
    return RowsTile(64, step, split, True, 4, 4)


def _fit(tile: RowsTile, num_rows: int, gated: bool, shared_memory: int) -> RowsTile:
    """Fewer stages where a smaller GPU has no room for them."""
    rows = max(16, 1 << (num_rows - 1).bit_length())
    stage = 2 * tile.inner * (tile.columns * (2 if gated else 1) + rows)
    stages = max(1, min(tile.stages, (shared_memory - 4096) // stage))
    return RowsTile(tile.columns, tile.inner, tile.split, tile.swap, stages, tile.warps)
