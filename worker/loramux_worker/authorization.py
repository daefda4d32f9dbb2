"""Which tenant may use which adapters, from a TOML file that may change while the worker runs.

    default = ["base", "shared/*"]              # what everybody may use

    [tenants]
    acme = ["acme/*"]                           # and what else the tenant `acme` may
    "umbrella corp" = ["base", "umbrella/*", "acme/one-for-all"]

A pattern is fnmatch's and meets adapter ids, without a revision; `*` crosses slashes. The word `base` is the base
model, which no pattern meets. A request names its tenant in a Kafka header, which is as trustworthy as whoever may
write to the requests topic: consumers are not told who wrote a record.
"""

from __future__ import annotations

import asyncio
import fnmatch
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loramux_schemas import AdapterName, ErrorCode, Headers, describe
from loramux_schemas.errors import printable
from loramux_worker.errors import ConfigurationError, RequestFailed

BASE: Final = "base"
LOOK_SECONDS: Final = 0.5

log = structlog.get_logger(__name__)

Patterns = tuple[Annotated[str, Field(min_length=1)], ...]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    default: Patterns = ()
    tenants: dict[str, Patterns] = {}


class Allowed(NamedTuple):
    """What one tenant may use: adapters whose id is matched, and the base model or not."""

    adapters: re.Pattern[str]
    base: bool

    @classmethod
    def by(cls, patterns: Patterns) -> Allowed:
        """Everything that one of the patterns allows."""
        translated = (fnmatch.translate(pattern) for pattern in patterns if pattern != BASE)
        return cls(re.compile("|".join(translated) or "(?!)"), BASE in patterns)

    def includes(self, adapter_id: str | None) -> bool:
        """Whether the adapter, or the base model (None), may be used."""
        return self.base if adapter_id is None else self.adapters.match(adapter_id) is not None


class Rules:
    """What a file says. Raises `ValueError` with what is wrong in one line."""

    def __init__(self, content: bytes) -> None:
        file = _parse(content)
        self._default = Allowed.by(file.default)
        self._tenants = {tenant: Allowed.by(file.default + patterns) for tenant, patterns in file.tenants.items()}

    def allow(self, tenant: str, adapter_id: str | None) -> bool:
        """Whether `tenant`, "" for nobody in particular, may use an adapter or the base model."""
        return self._tenants.get(tenant, self._default).includes(adapter_id)


class Authorization:
    """Decides by the file as it was last in order; `path` None allows everything.

    `header` is the Kafka header that names the tenant. Raises ConfigurationError for a file that is not in order.
    """

    def __init__(self, path: Path | None, header: str) -> None:
        self._path = path
        self._header = header
        self._rules: Rules | None = None
        self._version: object = None
        if path is not None:
            try:
                self._version = _version(path)  # before it is read: what changes meanwhile is a change
                self._rules = Rules(path.read_bytes())
            except (OSError, ValueError) as error:
                raise ConfigurationError(f"--authorization-file {path}: {_reason(error)}") from None

    def check(self, headers: Headers, adapter: AdapterName | None) -> None:
        """Returns if the record's tenant may use the adapter. Raises RequestFailed (`forbidden`)."""
        if self._rules is None:
            return
        tenant = self._tenant(headers)
        adapter_id = None if adapter is None else adapter.adapter_id
        if not self._rules.allow(tenant, adapter_id):
            who = f"tenant '{printable(tenant, limit=64)}'" if tenant else f"a request without header '{self._header}'"
            what = "the base model" if adapter_id is None else f"adapter '{adapter_id}'"
            raise RequestFailed(ErrorCode.FORBIDDEN, f"{who} may not use {what}")

    async def follow(self) -> None:
        """Takes over every change of the file, for ever. A file that is not in order changes nothing and is logged.

        A change counts once the file has stayed the same from one look to the next: one that is being written in
        place may look complete, and lack half of the tenants.
        """
        seen = self._version
        while self._path is not None:
            await asyncio.sleep(LOOK_SECONDS)
            now = await asyncio.to_thread(_version, self._path)
            if now == seen and now != self._version:
                self._version = now
                await self._reload(self._path)
            seen = now

    async def _reload(self, path: Path) -> None:
        try:
            self._rules = await asyncio.to_thread(lambda: Rules(path.read_bytes()))
        except (OSError, ValueError) as error:
            log.error("authorization_kept", file=str(path), reason=_reason(error))
        else:
            log.info("authorization_changed", file=str(path))

    def _tenant(self, headers: Headers) -> str:
        said = {value for name, value in headers if name == self._header}
        if len(said) > 1:
            # Consumers differ in which one counts: what a gateway checked may not be what is read here.
            raise RequestFailed(ErrorCode.FORBIDDEN, f"header '{self._header}' names more than one tenant")
        try:
            return (said.pop() or b"").decode() if said else ""
        except UnicodeDecodeError:
            raise RequestFailed(ErrorCode.FORBIDDEN, f"header '{self._header}' is not UTF-8") from None


def _parse(content: bytes) -> _File:
    try:
        return _File.model_validate(tomllib.loads(content.decode()))
    except ValidationError as error:
        raise ValueError(describe(error)) from None
    except RecursionError:
        raise ValueError("its arrays or tables are nested too deeply") from None


def _version(path: Path) -> object:
    """What differs when the file does, also when a link to it is moved, as in Kubernetes; None when it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
