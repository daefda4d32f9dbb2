"""Files of the Hugging Face hub.

    hf://{adapter_id}                      ids are org/name, each a repository
    hf://org/{adapter_id}@v1               one organisation's repositories, at a tag, branch or commit
    hf://org/name@v1/adapters/{adapter_id} folders of one repository

Where a file is, which commit a revision stands for and which digest its content has is asked through huggingface_hub,
with its own environment (`HF_TOKEN`, `HF_ENDPOINT`, …). The content is then read like any web server's, so that
ranges, retries and timeouts are the same everywhere; it comes from the commit that was looked up, which cannot change.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from urllib.parse import unquote

from loramux_worker.adapters.object_source import open_store, read_object
from loramux_worker.adapters.source import (
    IDLE_TIMEOUT,
    PLACEHOLDER,
    StoredFile,
    check_placeholder,
    misconfigured,
    unavailable,
)
from loramux_worker.adapters.transfer import backoff_seconds

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata
    from obstore import ObjectMeta
    from typing_extensions import Buffer

MAX_QUESTIONS = 16  # asked of the hub at the same time: each takes a thread

_SHA256 = re.compile(r"[0-9a-f]{64}")

Answer = TypeVar("Answer")


class _Place(NamedTuple):
    """A folder of a repository; `folder` ends with a slash unless it is the repository itself."""

    repo_id: str
    folder: str


class HubSource:
    """The repositories behind an hf:// template; `timeout` (seconds) bounds one question with its retries.

    Raises ConfigurationError, naming the setting, for a template that leads nowhere.
    """

    def __init__(self, template: str, timeout: float) -> None:
        from huggingface_hub import constants, get_token  # takes half a second: not for who has no use for it

        self._places, self._revision = split_hub_template(template)
        self._timeout = timeout
        self._endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        token = get_token()
        # Where the hub redirects to another host, to signed URLs, the header does not go along.
        self._store = open_store(self._endpoint, timeout, {"Authorization": f"Bearer {token}"} if token else None)
        self._threads = ThreadPoolExecutor(MAX_QUESTIONS, thread_name_prefix="hub")

    async def head(self, adapter_id: str, name: str) -> StoredFile | None:
        """As in `Source`."""
        if (place := self._place(adapter_id)) is None:
            return None
        path = f"{place.folder}{name}"
        metadata = await self._ask(adapter_id, partial(self._metadata, place.repo_id, path))
        if metadata is None:
            return None
        commit, etag, size = metadata.commit_hash, metadata.etag, metadata.size
        if commit is None or etag is None or size is None:
            raise unavailable(
                adapter_id, ValueError(f"{metadata.location}: the answer lacks what a hub says of a file")
            )
        sha256 = etag if _SHA256.fullmatch(etag) else None
        return StoredFile(name, size, etag, sha256, f"{place.repo_id}/resolve/{commit}/{path}")

    async def names(self, adapter_id: str) -> set[str]:
        """As in `Source`."""
        from huggingface_hub import HfApi

        if (place := self._place(adapter_id)) is None:
            return set()
        ask = HfApi(endpoint=self._endpoint).model_info
        info = await self._ask(adapter_id, partial(ask, place.repo_id, revision=self._revision, timeout=IDLE_TIMEOUT))
        siblings = (info and info.siblings) or ()
        inside = (file.rfilename for file in siblings if file.rfilename.startswith(place.folder))
        return {name for name in (path.removeprefix(place.folder) for path in inside) if "/" not in name}

    def read(self, adapter_id: str, file: StoredFile, first: int, last: int) -> AsyncGenerator[Buffer, None]:
        """As in `Source`. Whether the content is right its digest says: storage behind the hub has tags of its own."""

        def describe(name: str, meta: ObjectMeta) -> StoredFile:
            return StoredFile(name, meta["size"], file.version, file.sha256)

        return read_object(self._store, file.place, adapter_id, file, (first, last), describe)

    def _place(self, adapter_id: str) -> _Place | None:
        """Where an adapter is; None for an id that names no repository."""
        organisation, _, rest = self._places.replace(PLACEHOLDER, adapter_id).partition("/")
        name, _, folder = rest.partition("/")
        return _Place(f"{organisation}/{name}", f"{folder}/" if folder else "") if name else None

    def _metadata(self, repo_id: str, path: str) -> HfFileMetadata:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(repo_id, path, revision=self._revision, endpoint=self._endpoint)
        return get_hf_file_metadata(url, timeout=IDLE_TIMEOUT, endpoint=self._endpoint)

    async def _ask(self, adapter_id: str, question: Callable[[], Answer]) -> Answer | None:
        """The hub's answer, asked again while it is not up to one; None when there is no such thing.

        Raises RequestFailed (`adapter_unavailable`).
        """
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        loop = asyncio.get_running_loop()
        until, failures = loop.time() + self._timeout, 0
        while True:
            try:
                return await loop.run_in_executor(self._threads, question)
            except GatedRepoError as error:
                raise unavailable(adapter_id, error, denied=True) from error
            except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
                return None
            except Exception as error:  # of whatever HTTP client huggingface_hub stands on
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
                if status == 404:
                    return None
                failures += 1
                wait = backoff_seconds(failures)
                transient = status is None or status in (408, 429) or status >= 500
                if not transient or loop.time() + wait > until:
                    raise unavailable(adapter_id, error, denied=status in (401, 403)) from error
            await asyncio.sleep(wait)


def split_hub_template(template: str) -> tuple[str, str | None]:
    """The template of org/name/folder without the revision, and the revision. Raises ConfigurationError."""
    place = template.removeprefix("hf://")
    check_placeholder(template, place)
    if place.count("@") > 1:
        raise misconfigured(template, "may hold one '@', before the revision of the repository")
    match = re.search(r"@([^/]*)", place)
    revision = None if match is None else unquote(match[1])
    if revision is not None and (not revision or PLACEHOLDER in revision):
        raise misconfigured(template, "needs a branch, tag or commit after '@'")
    segments = (place if match is None else place.replace(match[0], "")).strip("/").split("/")
    if {"", ".", ".."} & set(segments):
        raise misconfigured(template, "may hold no empty part, no '.' and no '..'")
    if match is not None and "/" not in place[: match.start()] and PLACEHOLDER not in place[: match.start()]:
        raise misconfigured(template, "needs org/name before '@'")
    return "/".join(segments), revision
