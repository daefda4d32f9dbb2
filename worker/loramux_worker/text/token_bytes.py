"""Tokens that stand for bytes, not for text: a character may then be spread over several of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

TokenBytes = Callable[[str], bytes | None]


def token_bytes_of(decoder: dict[str, Any] | None) -> TokenBytes:
    """How to read the bytes of a token of a tokenizer with this decoder (its JSON, as in `tokenizer.json`).

    The function returned gives None for a token that is text, whose rendering is the decoder's own affair.
    """
    kinds = _kinds(decoder)
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}:
        return byte_level
    if "ByteFallback" in kinds:
        return byte_fallback
    return no_bytes


def byte_level(token: str) -> bytes | None:
    """GPT-2's alphabet: each character is one byte. A token with any other character is taken as it is."""
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode()


def byte_fallback(token: str) -> bytes | None:
    """SentencePiece's tokens for what its vocabulary lacks: `<0xE2>` is the byte 0xE2; others are text."""
    match = _BYTE_TOKEN.fullmatch(token)
    return None if match is None else bytes([int(match[1], 16)])


def no_bytes(token: str) -> bytes | None:
    """Every token is text."""
    return None


def _kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    if decoder["type"] == "Sequence":
        return {kind for part in decoder["decoders"] for kind in _kinds(part)}
    return {decoder["type"]}


def _byte_alphabet() -> dict[str, int]:
    """Printable Latin-1 characters stand for themselves, the other bytes for U+0100 and on (GPT-2's encoder)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
