"""Request ids: UUIDv7, which sort by the time they were made (RFC 9562, section 5.7)."""

from __future__ import annotations

import secrets
import time
import uuid


def new_request_id() -> str:
    """A new UUIDv7: 48 bits of Unix time in ms, version and variant, 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    bits = (milliseconds & (1 << 48) - 1) << 80 | secrets.randbits(80)
    bits = bits & ~(0xF << 76) | 0x7 << 76
    bits = bits & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=bits))
