"""What an adapter store stands on: a source of files, and what can go wrong with one.

LoramuxError
├── RequestFailed   `adapter_unavailable`: the source does not answer, or denies access
├── StoreChanged    list again
├── BrokenOff       go on from there
└── NoRanges        read the whole
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import structlog

from loramux_schemas import ErrorCode
from loramux_worker.errors import ConfigurationError, LoramuxError, RequestFailed

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = structlog.get_logger(__name__)

PLACEHOLDER = "{adapter_id}"
SCHEMES = ("file", "s3", "gs", "az", "http", "https", "hf")
CONNECT_TIMEOUT = 5.0  # seconds
IDLE_TIMEOUT = 10.0  # seconds without a byte

_QUERY = re.compile(r"\?\S+")
_USER = re.compile(r"(?<!hf:)//[^/\s]*@")  # in hf:// templates a revision follows the @
_CODE = re.compile(r"<Code>(\w+)</Code>")


class StoreChanged(LoramuxError):
    """A file is not (any more) what the listing said: list again."""


class BrokenOff(LoramuxError):
    """The content of a file ended before its end: what is there is right, and the rest may be asked for."""


class NoRanges(LoramuxError):
    """The server cannot send a part of a file."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of an adapter in the store.

    `version` changes when the content does (entity tag or time). `sha256` is the content's digest in hexadecimal
    where the store knows it. `place` is for the source alone: where these very bytes are.
    """

    name: str
    size: int
    version: str
    sha256: str | None = None
    place: str = field(default="", compare=False)


class Source(Protocol):
    """Files of adapters, by name. All three raise RequestFailed (`adapter_unavailable`)."""

    async def head(self, adapter_id: str, name: str) -> StoredFile | None:
        """One file of an adapter; None when it is not there."""

    async def names(self, adapter_id: str) -> set[str] | None:
        """Names of the files directly at an adapter's place; None where that cannot be asked."""

    def read(self, adapter_id: str, file: StoredFile, first: int, last: int) -> AsyncGenerator[Buffer, None]:
        """The bytes from `first` to before `last`, some MiB at a time. Raises StoreChanged, BrokenOff and NoRanges."""


def scheme_of(template: str) -> str:
    """What a template begins with. Raises ConfigurationError when that is none of SCHEMES."""
    scheme, separator, _ = template.partition("://")
    if not separator or scheme not in SCHEMES:
        raise misconfigured(template, f"begins with none of {', '.join(f'{known}://' for known in SCHEMES)}")
    return scheme


def check_placeholder(template: str, place: str) -> None:
    """Whether an adapter's id goes into the template, and nothing else. Raises ConfigurationError."""
    if PLACEHOLDER not in place:
        raise misconfigured(template, f"has no {PLACEHOLDER}, which stands for the adapter of a request")
    if any(character in place.replace(PLACEHOLDER, "") for character in "{}?#"):
        raise misconfigured(template, f"may hold no braces but those of {PLACEHOLDER}, no '?' and no '#'")


def misconfigured(value: str, reason: str) -> ConfigurationError:
    """The error for a template that leads nowhere."""
    return ConfigurationError(_USER.sub("//…@", f"--adapter-uri {value}: {reason}"))


def unavailable(adapter_id: str, error: BaseException, *, denied: bool = False) -> RequestFailed:
    """A store that does not answer; the details are for the log, not for whoever sent the request."""
    log.warning("adapter_store_failed", adapter_id=adapter_id, error=first_line(error))
    what = "denies access" if denied else "does not answer"
    return RequestFailed(ErrorCode.ADAPTER_UNAVAILABLE, f"adapter '{adapter_id}': the adapter store {what}")


def first_line(error: BaseException) -> str:
    """What obstore says before its debug output, with the code of the store's XML in place of the XML.

    Without query strings and without the user of a URL: an Azure one can hold a signature, and that one a password.
    """
    line, _, rest = str(error).partition("\n")
    line, xml, end = line.partition("<?xml")
    code = _CODE.search(end + rest) if xml else None
    shown = line.rstrip(" :") + ("" if code is None else f" ({code[1]})")
    return _USER.sub("//…@", _QUERY.sub("?…", shown))[:400]
