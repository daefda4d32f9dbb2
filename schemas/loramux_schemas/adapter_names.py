"""Adapter names: `adapter_id` or `adapter_id@revision`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loramux_schemas.errors import printable

MAX_ADAPTER_NAME_CHARS = 256

_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")


@dataclass(frozen=True, slots=True)
class AdapterName:
    """An adapter's place in the store and, if pinned, the revision that is asked for.

    Every instance is valid, so that a name can safely become part of a path or an object key: segments of
    `[A-Za-z0-9._-]`, none of them `.` or `..`, joined by `/`; a revision such as `sha256:…` holds no `/`; 256
    characters in all. Raises `ValueError` with a one-line reason.
    """

    adapter_id: str
    revision: str | None = None

    def __post_init__(self) -> None:
        if len(str(self)) > MAX_ADAPTER_NAME_CHARS:
            raise ValueError(f"adapter name is longer than {MAX_ADAPTER_NAME_CHARS} characters")
        for segment in self.adapter_id.split("/"):
            if segment in ("", ".", "..") or not _SEGMENT.fullmatch(segment):
                raise ValueError(
                    f"{_quote(self.adapter_id)} is not an adapter id: segments of letters, digits, "
                    "'.', '_' and '-', joined by '/', none of them '.' or '..'"
                )
        if self.revision is not None and not _REVISION.fullmatch(self.revision):
            raise ValueError(f"{_quote(self.revision)} is not a revision: letters, digits, '.', '_', ':' and '-'")

    def __str__(self) -> str:
        return self.adapter_id if self.revision is None else f"{self.adapter_id}@{self.revision}"

    @classmethod
    def parse(cls, text: str) -> AdapterName:
        """Read `name` or `name@revision`; raises `ValueError` with a one-line reason."""
        if len(text) > MAX_ADAPTER_NAME_CHARS:
            raise ValueError(f"adapter name is longer than {MAX_ADAPTER_NAME_CHARS} characters")
        adapter_id, pinned, revision = text.partition("@")
        return cls(adapter_id, revision if pinned else None)


def _quote(text: str) -> str:
    return f"'{printable(text, limit=64)}'"
