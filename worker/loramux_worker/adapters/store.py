"""The store tier: adapters in object storage, found by a URI template, read through obstore.

    s3://bucket/adapters/{adapter_id}      also file://, gs://, az://, http:// and https://

Credentials and endpoints come from each cloud's usual environment variables (`AWS_ACCESS_KEY_ID`,
`AWS_ENDPOINT_URL`, …). S3 needs `s3:GetObject` and `s3:ListBucket`: without the second, S3 says "forbidden"
for what is not there. Plain web servers need nothing but GET and HEAD, and a 404 for what is not there.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol
from urllib.parse import unquote

import obstore
import obstore.store
import structlog
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

from loramux_schemas import ErrorCode
from loramux_worker.adapters.revisions import FileDigest
from loramux_worker.adapters.text_files import MAX_TEXT_BYTES
from loramux_worker.errors import ConfigurationError, LoramuxError, RequestFailed

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore

log = structlog.get_logger(__name__)

PLACEHOLDER = "{adapter_id}"
SCHEMES = ("file", "s3", "gs", "az", "http", "https")
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 4 << 20
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CHUNK_BYTES = 4 << 20
LISTED_NAMES = 1000

_QUERY = re.compile(r"\?\S+")
_CODE = re.compile(r"<Code>(\w+)</Code>")


class StoreChanged(LoramuxError):
    """A file is not (any more) what the listing said: list again."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of an adapter in the store. `version` changes when the content does (entity tag or time)."""

    name: str
    size: int
    version: str


class Store(Protocol):
    """What the catalog asks of a store. Both coroutines raise RequestFailed, `download` StoreChanged too."""

    def uri(self, adapter_id: str) -> str:
        """The adapter's place, unique among all stores."""

    async def list(self, adapter_id: str) -> tuple[StoredFile, ...]:
        """The files of a usable adapter."""

    async def download(self, adapter_id: str, file: StoredFile, destination: Path) -> FileDigest:
        """Writes one listed file to `destination`."""


class AdapterStore:
    """The object storage behind `--adapter-uri`; `timeout` (seconds) bounds one request with all its retries.
    `on_bytes` is told the size of each chunk that a download has written.

    Raises ConfigurationError, naming the setting, for a template that leads nowhere.
    """

    def __init__(
        self, template: str, *, timeout: float = 30.0, on_bytes: Callable[[int], None] = lambda count: None
    ) -> None:
        base, self._key_template = split_template(template)
        self._template = template
        self._store = open_store(base, timeout)
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
        found = await asyncio.gather(*(self._head(adapter_id, name) for name in names))
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
        """Streams a file to disk, a few MiB in memory at a time.

        Raises StoreChanged when the file is not what was listed, RequestFailed (`adapter_unavailable`) when
        the store fails, OSError when the disk does.
        """
        digest = hashlib.sha256()
        size = 0
        with await asyncio.to_thread(destination.open, "wb") as sink:
            async with aclosing(self._chunks(adapter_id, file)) as chunks:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > file.size:
                        break
                    await asyncio.to_thread(_append, sink, digest, chunk)
                    self._on_bytes(len(chunk))
            await asyncio.to_thread(sink.flush)
        if size != file.size:
            raise StoreChanged(f"{file.name} of adapter '{adapter_id}' is not {file.size} bytes long")
        return FileDigest(file.name, size, digest.hexdigest())

    async def _chunks(self, adapter_id: str, file: StoredFile) -> AsyncGenerator[bytes, None]:
        try:
            answer = await self._store.get_async(self._key(adapter_id, file.name))
            if _stored_file(file.name, answer.meta) != file:
                raise StoreChanged(f"{file.name} of adapter '{adapter_id}' has changed")
            async for chunk in answer.stream(min_chunk_size=CHUNK_BYTES):
                yield chunk
        except FileNotFoundError:
            raise StoreChanged(f"{file.name} of adapter '{adapter_id}' has gone") from None
        except (BaseError, OSError) as error:
            raise _unavailable(adapter_id, error) from error

    async def _head(self, adapter_id: str, name: str) -> StoredFile | None:
        try:
            return _stored_file(name, await self._store.head_async(self._key(adapter_id, name)))
        except (BaseError, OSError) as error:
            if isinstance(error, FileNotFoundError) or _cannot_exist(error):
                return None
            raise _unavailable(adapter_id, error) from error

    async def _text_files(self, adapter_id: str) -> tuple[StoredFile, ...]:
        names = set(MAX_TEXT_BYTES)
        if not isinstance(self._store, obstore.store.HTTPStore):
            place = self._key(adapter_id, "")
            try:
                listing = await obstore.list_with_delimiter_async(self._store, place)
            except (BaseError, OSError) as error:
                raise _unavailable(adapter_id, error) from error
            names &= {entry["path"].removeprefix(place) for entry in listing["objects"]}
        found = await asyncio.gather(*(self._head(adapter_id, name) for name in sorted(names)))
        return tuple(file for file in found if file is not None)

    async def _refuse(self, adapter_id: str, found: set[str]) -> None:
        """Says what is wrong with a place that has not both files. Always raises RequestFailed."""
        others = await self._names(adapter_id)
        pickles = sorted(name for name in others if name.endswith(PICKLE_SUFFIXES))
        if not found and not others:
            raise RequestFailed(ErrorCode.ADAPTER_NOT_FOUND, f"there is no adapter '{adapter_id}' in the store")
        reason = f"{CONFIG_FILE if CONFIG_FILE not in found else WEIGHTS_FILE} is missing"
        if WEIGHTS_FILE not in found and pickles:
            reason = f"its weights are a pickle ({pickles[0]}), which is never read: save them as {WEIGHTS_FILE}"
        raise RequestFailed(ErrorCode.ADAPTER_INVALID, f"adapter '{adapter_id}' cannot be used: {reason}")

    async def _names(self, adapter_id: str) -> set[str]:
        """Names of files directly at an adapter's place, out of the first thousand keys below it."""
        if isinstance(self._store, obstore.store.HTTPStore):
            return set()
        place = self._key_template.replace(PLACEHOLDER, adapter_id) + "/"
        try:
            async for page in obstore.list(self._store, place, chunk_size=LISTED_NAMES):
                names = (entry["path"].removeprefix(place) for entry in page)
                return {name for name in names if "/" not in name}
        except (BaseError, OSError) as error:
            if not _cannot_exist(error):
                raise _unavailable(adapter_id, error) from error
        return set()

    def _key(self, adapter_id: str, name: str) -> str:
        return f"{self._key_template.replace(PLACEHOLDER, adapter_id)}/{name}"


def split_template(template: str) -> tuple[str, str]:
    """The URL of the folder above all adapters, and the key of an adapter below it. Raises ConfigurationError."""
    scheme, separator, place = template.partition("://")
    if not separator or scheme not in (*SCHEMES, "hf"):
        raise _misconfigured(template, f"begins with none of {', '.join(f'{known}://' for known in SCHEMES)}")
    if scheme == "hf":
        raise _misconfigured(template, "hf:// is not supported yet")
    if PLACEHOLDER not in place:
        raise _misconfigured(template, f"has no {PLACEHOLDER}, which stands for the adapter of a request")
    if any(character in place.replace(PLACEHOLDER, "") for character in "{}?#"):
        raise _misconfigured(template, f"may hold no braces but those of {PLACEHOLDER}, no '?' and no '#'")
    before, _, after = place.partition(PLACEHOLDER)
    base, slash, prefix = before.rpartition("/")
    key = "/".join(segment for segment in f"{prefix}{PLACEHOLDER}{after}".split("/") if segment)
    if not slash or (scheme != "file" and not base):
        raise _misconfigured(template, f"needs a bucket or host before {PLACEHOLDER}")
    if {".", ".."} & set(key.split("/")):
        raise _misconfigured(template, "may hold no '.' or '..'")
    return f"{scheme}://{base}", key


def open_store(base: str, timeout: float) -> ObjectStore:
    """The obstore client of a URL. Raises ConfigurationError."""
    scheme, _, place = base.partition("://")
    try:
        if scheme == "file":
            return obstore.store.LocalStore(_local_folder(base, place))
        options: ClientConfig = {
            "connect_timeout": timedelta(seconds=5),
            "timeout": timedelta(seconds=timeout),
        }
        if scheme == "http" or (scheme == "s3" and _s3_endpoint().startswith("http://")):
            options["allow_http"] = True
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
        raise _misconfigured(base, first_line(error)) from error


def _local_folder(base: str, place: str) -> str:
    if place and not place.startswith("/"):
        raise _misconfigured(base, "needs an absolute path: three slashes after file:")
    folder = unquote(place) or "/"
    if not os.path.isdir(folder):
        raise _misconfigured(base, f"there is no folder {folder}")
    return folder


def _s3_endpoint() -> str:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _stored_file(name: str, meta: ObjectMeta) -> StoredFile:
    return StoredFile(name, meta["size"], meta["e_tag"] or meta["last_modified"].isoformat())


def _append(sink: BinaryIO, digest: hashlib._Hash, chunk: bytes) -> None:
    digest.update(chunk)
    sink.write(chunk)


def _cannot_exist(error: Exception) -> bool:
    """Whether a local path leads through a file or is too long to be one; obstore has only text for these."""
    text = str(error)
    return any(f"(os error {number})" in text for number in (errno.ENOTDIR, errno.ENAMETOOLONG))


def _unavailable(adapter_id: str, error: Exception) -> RequestFailed:
    """A store that does not answer; the details are for the log, not for whoever sent the request."""
    log.warning("adapter_store_failed", adapter_id=adapter_id, error=first_line(error))
    denied = isinstance(error, PermissionDeniedError | UnauthenticatedError) or "403 Forbidden" in first_line(error)
    what = "denies access" if denied else "does not answer"
    return RequestFailed(ErrorCode.ADAPTER_UNAVAILABLE, f"adapter '{adapter_id}': the adapter store {what}")


def _misconfigured(value: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"--adapter-uri {value}: {reason}")


def first_line(error: BaseException) -> str:
    """What obstore says before its debug output, with the code of the store's XML in place of the XML.

    Without query strings: an Azure one can hold a signature.
    """
    line, _, rest = str(error).partition("\n")
    line, xml, end = line.partition("<?xml")
    code = _CODE.search(end + rest) if xml else None
    shown = line.rstrip(" :") + ("" if code is None else f" ({code[1]})")
    return _QUERY.sub("?…", shown)[:400]
