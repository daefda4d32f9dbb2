"""The string beside a committed offset: which requests above that offset have been answered already.

One version byte, then a bitmap whose bit i (least significant first) stands for offset `position + i`; all of
it in base85, so that a window of MAX_WINDOW offsets fits into the 4,096 characters that a broker takes. No
bit set: the empty string, which is also what every other tool writes.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Final

MAX_CHARACTERS: Final = 4096
VERSION: Final = 1

# base85 makes 5 characters of 4 bytes; the first byte is the version.
MAX_WINDOW: Final = (MAX_CHARACTERS // 5 * 4 - 1) * 8


def encode(position: int, answered: Iterable[int]) -> str:
    """The metadata for a commit of `position`; every answered offset lies in [position, position +
    MAX_WINDOW).

    Raises ValueError for an offset outside of it.
    """
    bitmap = bytearray()
    for offset in answered:
        index, bit = divmod(offset - position, 8)
        if not 0 <= index < MAX_WINDOW // 8:
            raise ValueError(f"offset {offset} is outside the window that begins at {position}")
        if index >= len(bitmap):
            bitmap.extend(bytes(index + 1 - len(bitmap)))
        bitmap[index] |= 1 << bit
    return base64.b85encode(bytes([VERSION]) + bitmap).decode() if bitmap else ""


def decode(position: int, metadata: str | None) -> frozenset[int]:
    """The answered offsets at and above the committed `position`.

    Raises ValueError for a string that `encode` did not write.
    """
    if not metadata:
        return frozenset()
    version, *bitmap = base64.b85decode(metadata)
    if version != VERSION:
        raise ValueError(f"commit metadata of version {version}, this worker reads version {VERSION}")
    return frozenset(
        position + 8 * index + bit for index, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1
    )
