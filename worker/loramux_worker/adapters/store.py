"""The store tier: adapters found by a URI template, wherever they are.

s3://bucket/adapters/{adapter_id}      also file://, gs://, az://, http:// and https:// (`object_source`)
hf://org/{adapter_id}@main             the Hugging Face hub (`hub_source`)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from loramux_schemas import ErrorCode
from loramux_worker.adapters.hub_source import HubSource
from loramux_worker.adapters.object_source import ObjectSource
from loramux_worker.adapters.revisions import FileDigest
from loramux_worker.adapters.source import PLACEHOLDER, Source, StoredFile, scheme_of
from loramux_worker.adapters.text_files import MAX_TEXT_BYTES
from loramux_worker.adapters.transfer import download
from loramux_worker.errors import RequestFailed

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 4 << 20
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Store(Protocol):
    """What the catalog asks of a store. Both coroutines raise RequestFailed, `download` StoreChanged too."""

    def uri(self, adapter_id: str) -> str:
        """The adapter's place, unique among all stores."""

    async def list(self, adapter_id: str) -> tuple[StoredFile, ...]:
        """The files of a usable adapter."""

    async def download(self, adapter_id: str, file: StoredFile, destination: Path) -> FileDigest:
        """Writes one listed file to `destination`."""


class AdapterStore:
    """What is behind `--adapter-uri`; `timeout` (seconds) bounds one request with all its retries.
    `on_bytes` is told the size of each chunk that a download has written.

    Raises ConfigurationError, naming the setting, for a template that leads nowhere.
    """

    def __init__(
        self, template: str, *, timeout: float = 30.0, on_bytes: Callable[[int], None] = lambda count: None
    ) -> None:
        self._template = template
        self._source = open_source(template, timeout)
        self._on_bytes = on_bytes

    def uri(self, adapter_id: str) -> str:
        """The adapter's place, unique among all stores."""
        return self._template.replace(PLACEHOLDER, adapter_id)

    async def list(self, adapter_id: str) -> tuple[StoredFile, ...]:
        """The files of an adapter: both that it must have, and those of its text that it brings.

        They are looked up by name. Only what text there may be is taken from a listing, so that an adapter without
        any costs one request more and not one for each name; a web server has no listing and is asked for each.

        Raises RequestFailed: `adapter_not_found` where nothing is, `adapter_invalid` where something else is,
        `adapter_unavailable` when the store does not answer or denies access.
        """
        names = (CONFIG_FILE, WEIGHTS_FILE)
        found = await asyncio.gather(*(self._source.head(adapter_id, name) for name in names))
        files = tuple(file for file in found if file is not None)
        if len(files) < len(names):
            await self._refuse(adapter_id, {file.name for file in files})
        files += await self._text_files(adapter_id)
        for file in files:
            most = MAX_CONFIG_BYTES if file.name == CONFIG_FILE else MAX_TEXT_BYTES.get(file.name, file.size)
            if file.size > most:
                raise RequestFailed(
                    ErrorCode.ADAPTER_INVALID,
                    f"adapter '{adapter_id}': {file.name} has {file.size} bytes, over {most}",
                )
        return files

    async def download(self, adapter_id: str, file: StoredFile, destination: Path) -> FileDigest:
        """Brings a file to disk, a few MiB in memory at a time.

        Raises StoreChanged when the file is not what was listed, RequestFailed (`adapter_unavailable`) when
        the store fails, OSError when the disk does.
        """
        return await download(self._source, adapter_id, file, destination, self._on_bytes)

    async def _text_files(self, adapter_id: str) -> tuple[StoredFile, ...]:
        there = await self._source.names(adapter_id)
        names = sorted(set(MAX_TEXT_BYTES) if there is None else MAX_TEXT_BYTES.keys() & there)
        found = await asyncio.gather(*(self._source.head(adapter_id, name) for name in names))
        return tuple(file for file in found if file is not None)

    async def _refuse(self, adapter_id: str, found: set[str]) -> None:
        """Says what is wrong with a place that has not both files. Always raises RequestFailed."""
        others = await self._source.names(adapter_id) or set()
        pickles = sorted(name for name in others if name.endswith(PICKLE_SUFFIXES))
        if not found and not others:
            raise RequestFailed(ErrorCode.ADAPTER_NOT_FOUND, f"there is no adapter '{adapter_id}' in the store")
        reason = f"{CONFIG_FILE if CONFIG_FILE not in found else WEIGHTS_FILE} is missing"
        if WEIGHTS_FILE not in found and pickles:
            reason = f"its weights are a pickle ({pickles[0]}), which is never read: save them as {WEIGHTS_FILE}"
        raise RequestFailed(ErrorCode.ADAPTER_INVALID, f"adapter '{adapter_id}' cannot be used: {reason}")


def open_source(template: str, timeout: float) -> Source:
    """What reads the places of a template. Raises ConfigurationError."""
    return HubSource(template, timeout) if scheme_of(template) == "hf" else ObjectSource(template, timeout)
