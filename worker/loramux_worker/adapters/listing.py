"""Which adapters a store holds: the folders below an adapter URI that have both files."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import datetime

import obstore
import obstore.store
from obstore.exceptions import BaseError

from loramux_schemas import AdapterName
from loramux_worker.adapters.object_source import open_store, split_template
from loramux_worker.adapters.source import PLACEHOLDER, first_line, misconfigured, scheme_of
from loramux_worker.adapters.store import CONFIG_FILE, WEIGHTS_FILE

# Half-seen folders that are remembered. Stores list by name, or folder by folder: between the two files of one adapter
# comes only what lies below it, so what is forgotten here is a folder that lacks a file.
_MAX_HALVES = 10_000


@dataclass(frozen=True, slots=True)
class ListedAdapter:
    """An adapter in the store: bytes of both files together, and when the younger one was written (UTC)."""

    adapter_id: str
    size: int
    last_modified: datetime


async def list_adapters(template: str, *, timeout: float = 30.0) -> AsyncGenerator[ListedAdapter, None]:
    """Yields the adapters in the order of the store, holding no more than one page of its listing.

    Folders whose names no request can name are left out. Whether a worker would serve an adapter is not looked at.

    Raises:
        ConfigurationError: the template leads nowhere, the store has no listing or does not answer.
    """
    if scheme_of(template) == "hf":
        raise misconfigured(template, "the Hugging Face hub is not listed; look at the organisation's page there")
    base, key_template = split_template(template)
    store = open_store(base, timeout)
    if isinstance(store, obstore.store.HTTPStore):
        raise misconfigured(template, "a plain web server cannot list what it holds; list the store behind it")
    pattern = _pattern(key_template)
    halves: dict[str, ListedAdapter] = {}
    try:
        async for page in obstore.list(store):
            for entry in page:
                match = pattern.fullmatch(entry["path"])
                if match is None or not _is_name(adapter_id := match["adapter_id"]):
                    continue
                size, when = entry["size"], entry["last_modified"]
                other = halves.pop(adapter_id, None)
                if other is not None:
                    yield ListedAdapter(adapter_id, size + other.size, max(when, other.last_modified))
                    continue
                halves[adapter_id] = ListedAdapter(adapter_id, size, when)
                if len(halves) > _MAX_HALVES:
                    del halves[next(iter(halves))]
    except (BaseError, OSError) as error:
        raise misconfigured(template, f"cannot be listed: {first_line(error)}") from error


def _pattern(key_template: str) -> re.Pattern[str]:
    """What the keys of an adapter's two files look like."""
    first, *others = (re.escape(part) for part in key_template.split(PLACEHOLDER))
    places = "(?P=adapter_id)".join(others)
    return re.compile(f"{first}(?P<adapter_id>.+){places}/(?:{re.escape(CONFIG_FILE)}|{re.escape(WEIGHTS_FILE)})")


def _is_name(adapter_id: str) -> bool:
    try:
        AdapterName(adapter_id)
    except ValueError:
        return False
    return True
