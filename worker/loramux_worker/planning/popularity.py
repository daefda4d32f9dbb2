"""Which share of the requests names which adapter."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loramux_worker.errors import ConfigurationError

Floats = NDArray[np.floating[Any]]


def zipf(adapters: int, exponent: float) -> Floats:
    """Shares [adapters], the most popular first: 1 / (place ** exponent), scaled to a sum of 1."""
    weights = np.arange(1, adapters + 1, dtype=float) ** -exponent
    return _scaled(weights)


def read_counts(path: Path) -> Floats:
    """Shares from a CSV of counts: of each row the last field, `adapter,count` or a bare count.

    A first row without a number is a heading. Raises ConfigurationError for what is not a count.
    """
    try:
        rows = [row for row in csv.reader(path.read_text().splitlines()) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"--popularity {path}: it cannot be read ({error})") from error
    if rows and _count(rows[0]) is None:
        rows = rows[1:]
    counts = [_count(row) for row in rows]
    for row, count in zip(rows, counts, strict=True):
        if count is None:
            raise ConfigurationError(f"--popularity {path}: '{','.join(row)}' does not end with a count")
    shares = np.sort(np.array(counts, dtype=float))[::-1]
    if not shares.sum():
        raise ConfigurationError(f"--popularity {path}: it counts no request")
    return _scaled(shares)


def _scaled(weights: Floats) -> Floats:
    scaled: Floats = weights / weights.sum()
    return scaled


def _count(row: list[str]) -> float | None:
    try:
        count = float(row[-1])
    except ValueError:
        return None
    return count if 0 <= count < float("inf") else None
