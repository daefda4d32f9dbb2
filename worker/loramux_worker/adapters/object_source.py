"""Files in object storage, in folders and on plain web servers, through obstore.

Credentials and endpoints come from each cloud's usual environment variables (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`,
…). S3 needs `s3:GetObject` and `s3:ListBucket`: without the second, S3 says "forbidden" for what is not there. Plain
web servers need nothing but GET and HEAD, and a 404 for what is not there.

obstore itself retries, with exponential back-off and jitter, what a server answers with 5xx, 408 or 429, connections
that fail and reads that time out, and takes a broken body up where it broke if the server gives entity tags.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator, Callable
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import unquote

import obstore
import obstore.store
from obstore.exceptions import BaseError, NotSupportedError, PermissionDeniedError, UnauthenticatedError

from loramux_worker.adapters.source import (
    CONNECT_TIMEOUT,
    IDLE_TIMEOUT,
    PLACEHOLDER,
    BrokenOff,
    NoRanges,
    StoreChanged,
    StoredFile,
    check_placeholder,
    first_line,
    misconfigured,
    unavailable,
)
from loramux_worker.errors import RequestFailed

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore
    from typing_extensions import Buffer

CHUNK_BYTES = 1 << 20


class ObjectSource:
    """The folder, bucket or web server behind a template; `timeout` (seconds) bounds one request with its retries.

    Raises ConfigurationError, naming the setting, for a template that leads nowhere.
    """

    def __init__(self, template: str, timeout: float) -> None:
        base, self._key_template = split_template(template)
        self._store = open_store(base, timeout)

    async def head(self, adapter_id: str, name: str) -> StoredFile | None:
        """As in `Source`."""
        try:
            return _stored_file(name, await self._store.head_async(self._key(adapter_id, name)))
        except (BaseError, OSError) as error:
            if isinstance(error, FileNotFoundError) or _cannot_exist(error):
                return None
            raise _failed(adapter_id, error) from error

    async def names(self, adapter_id: str) -> set[str] | None:
        """As in `Source`; a web server has no listing."""
        if isinstance(self._store, obstore.store.HTTPStore):
            return None
        place = self._key(adapter_id, "")
        try:
            listing = await obstore.list_with_delimiter_async(self._store, place)
            return {entry["path"].removeprefix(place) for entry in listing["objects"]}
        except (BaseError, OSError) as error:
            if not _cannot_exist(error):
                raise _failed(adapter_id, error) from error
        return set()

    def read(self, adapter_id: str, file: StoredFile, first: int, last: int) -> AsyncGenerator[Buffer, None]:
        """As in `Source`."""
        key = self._key(adapter_id, file.name)
        return read_object(self._store, key, adapter_id, file, (first, last), _stored_file)

    def _key(self, adapter_id: str, name: str) -> str:
        return f"{self._key_template.replace(PLACEHOLDER, adapter_id)}/{name}"


async def read_object(
    store: ObjectStore,
    key: str,
    adapter_id: str,
    file: StoredFile,
    span: tuple[int, int],
    describe: Callable[[str, ObjectMeta], StoredFile],
) -> AsyncGenerator[Buffer, None]:
    """`Source.read` over obstore; `describe` turns the answer's headers into what must be equal to `file`."""
    whole = span == (0, file.size)  # then no range is asked for, which some servers do not know
    try:
        answer = await store.get_async(key, options=None if whole else {"range": span})
    except FileNotFoundError:
        raise StoreChanged(f"{file.name} of adapter '{adapter_id}' has gone") from None
    except NotSupportedError as error:
        raise NoRanges(first_line(error)) from error
    except (BaseError, OSError) as error:
        raise _failed(adapter_id, error) from error
    if describe(file.name, answer.meta) != file:
        raise StoreChanged(f"{file.name} of adapter '{adapter_id}' has changed")
    chunks = answer.stream(min_chunk_size=CHUNK_BYTES)
    while True:
        try:
            chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except (BaseError, OSError) as error:
            raise BrokenOff(first_line(error)) from error
        yield chunk


def split_template(template: str) -> tuple[str, str]:
    """The URL of the folder above all adapters, and the key of an adapter below it. Raises ConfigurationError."""
    scheme, _, place = template.partition("://")
    check_placeholder(template, place)
    before, _, after = place.partition(PLACEHOLDER)
    base, slash, prefix = before.rpartition("/")
    key = "/".join(segment for segment in f"{prefix}{PLACEHOLDER}{after}".split("/") if segment)
    if not slash or (scheme != "file" and not base):
        raise misconfigured(template, f"needs a bucket or host before {PLACEHOLDER}")
    if {".", ".."} & set(key.split("/")):
        raise misconfigured(template, "may hold no '.' or '..'")
    return f"{scheme}://{base}", key


def open_store(base: str, timeout: float, headers: dict[str, str] | None = None) -> ObjectStore:
    """The obstore client of a URL. Raises ConfigurationError."""
    scheme, _, place = base.partition("://")
    options: ClientConfig = {
        "connect_timeout": timedelta(seconds=min(CONNECT_TIMEOUT, timeout)),
        "read_timeout": timedelta(seconds=min(IDLE_TIMEOUT, timeout)),
        "timeout": timedelta(seconds=timeout),
        # Clouds are asked by https unless the environment names an http:// endpoint, which is meant then.
        "allow_http": scheme != "https",
        "default_headers": headers or {},
    }
    try:
        if scheme == "file":
            return obstore.store.LocalStore(_local_folder(base, place))
        return obstore.store.from_url(
            base,
            client_options=options,
            retry_config={
                "max_retries": 10,
                "retry_timeout": timedelta(seconds=timeout),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=3),
                    "base": 2,
                },
            },
        )
    except (BaseError, ValueError) as error:
        raise misconfigured(base, first_line(error)) from error


def _local_folder(base: str, place: str) -> str:
    if place and not place.startswith("/"):
        raise misconfigured(base, "needs an absolute path: three slashes after file:")
    folder = unquote(place) or "/"
    if not os.path.isdir(folder):
        raise misconfigured(base, f"there is no folder {folder}")
    return folder


def _stored_file(name: str, meta: ObjectMeta) -> StoredFile:
    return StoredFile(name, meta["size"], meta["e_tag"] or meta["last_modified"].isoformat())


def _cannot_exist(error: Exception) -> bool:
    """Whether a local path leads through a file or is too long to be one; obstore has only text for these."""
    text = str(error)
    return any(f"(os error {number})" in text for number in (errno.ENOTDIR, errno.ENAMETOOLONG))


def _failed(adapter_id: str, error: Exception) -> RequestFailed:
    denied = isinstance(error, PermissionDeniedError | UnauthenticatedError) or "403 Forbidden" in first_line(error)
    return unavailable(adapter_id, error, denied=denied)
