"""The tokenizer of each adapter, made of the text that it brings, once for all adapters that bring the same."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import structlog

from loramux_worker.adapters.regular_file import unreadable
from loramux_worker.engine.protocol import AdapterReference
from loramux_worker.errors import RequestFailed
from loramux_worker.text.adapter_text import AdapterText
from loramux_worker.text.tokenizer import Tokenizer

log = structlog.get_logger(__name__)

CAPACITY = 1024  # tokenizers that are kept, in units of one that shares the model's vocabulary
OWN_PIPELINE = 32  # units of one that does not: some 30 MB for 128,000 tokens, so 1 GB for all of them
MAX_REVISIONS = 1 << 14  # whose text is known; some 400 bytes each
NUM_THREADS = 4
NUM_LOADERS = 2

T = TypeVar("T")


class Tokenizers:
    """Finds the tokenizer of a request; `base` is that of `model`, a folder or hub id.

    An adapter's files were written by somebody whom the operator need not know: what is done with them is done in
    threads of its own, so that nobody else's text waits for it. Belongs to one event loop. `close` it.
    """

    def __init__(self, base: Tokenizer, model: str, *, capacity: int = CAPACITY) -> None:
        self._base = base
        self._model = model
        self._capacity = capacity
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="adapter-text")
        self._loaders = ThreadPoolExecutor(NUM_LOADERS, thread_name_prefix="adapter-text-load")
        self._digests: OrderedDict[str, str] = OrderedDict()  # by revision
        self._reads: dict[str, asyncio.Task[asyncio.Task[Tokenizer]]] = {}  # by revision
        self._loads: OrderedDict[str, asyncio.Task[Tokenizer]] = OrderedDict()  # by digest

    def __len__(self) -> int:
        """Tokenizers that are kept."""
        return len(self._loads)

    async def of(self, adapter: AdapterReference | None) -> Tokenizer:
        """The adapter's tokenizer; its folder must stay on disk meanwhile. None: the model's.

        Raises RequestFailed: `adapter_invalid` for text that cannot be used, `adapter_unavailable` when the disk
        fails. Cancelling one caller leaves the work to the others.
        """
        if adapter is None:
            return self._base
        load = self._known(adapter.revision)
        if load is None:
            load = await _outcome(self._reading(adapter))
        return await _outcome(load)

    def close(self) -> None:
        """End what is under way."""
        for task in (*self._reads.values(), *self._loads.values()):
            task.cancel()
        for threads in (self._threads, self._loaders):
            threads.shutdown(wait=False, cancel_futures=True)

    def _known(self, revision: str) -> asyncio.Task[Tokenizer] | None:
        """What was made of a revision's text, marked as just used."""
        digest = self._digests.get(revision)
        if digest is None or digest not in self._loads:
            return None
        self._digests.move_to_end(revision)
        self._loads.move_to_end(digest)
        return self._loads[digest]

    def _reading(self, adapter: AdapterReference) -> asyncio.Task[asyncio.Task[Tokenizer]]:
        """The look at a revision's files that is under way, or a new one."""
        if (read := self._reads.get(adapter.revision)) is None:
            read = self._reads[adapter.revision] = asyncio.create_task(self._read(adapter))
            read.add_done_callback(lambda _: self._reads.pop(adapter.revision))
        return read

    async def _read(self, adapter: AdapterReference) -> asyncio.Task[Tokenizer]:
        """What was made of text like this revision's before, or the making that has just begun."""
        text, digest = await asyncio.to_thread(_read, Path(adapter.path))
        self._digests[adapter.revision] = digest
        while len(self._digests) > MAX_REVISIONS:
            self._digests.popitem(last=False)
        if (load := self._loads.get(digest)) is None:
            load = self._loads[digest] = asyncio.create_task(self._load(text, adapter.adapter_id))
            load.add_done_callback(lambda done: self._keep(digest, done))
        return load

    async def _load(self, text: AdapterText, adapter_id: str) -> Tokenizer:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            tokenizer = await loop.run_in_executor(
                self._loaders, text.tokenizer, self._base, self._model, self._threads
            )
        except OSError as error:
            raise unreadable("its tokenizer", error) from error
        if text.files:
            seconds = round(loop.time() - started, 3)
            log.info("adapter_text_loaded", adapter_id=adapter_id, files=sorted(text.files), seconds=seconds)
        return tokenizer

    def _keep(self, digest: str, load: asyncio.Task[Tokenizer]) -> None:
        """Keep what was made, a refusal too, but not a failure that may pass."""
        if load.cancelled():
            return
        failure = load.exception()
        if failure is None or (isinstance(failure, RequestFailed) and not failure.code.retryable):
            self._trim()
        else:
            del self._loads[digest]

    def _trim(self) -> None:
        """Forget what was not used for longest until the rest fits; what is being made is in use."""
        weights = {digest: self._weight(load) for digest, load in self._loads.items()}
        total = sum(weights.values())
        for digest, load in list(self._loads.items())[:-1]:
            if total <= self._capacity:
                return
            if load.done():
                del self._loads[digest]
                total -= weights[digest]

    def _weight(self, load: asyncio.Task[Tokenizer]) -> int:
        if not load.done() or load.cancelled() or load.exception() is not None:
            return 1
        return 1 if load.result().pipeline is self._base.pipeline else OWN_PIPELINE


async def _outcome(task: asyncio.Task[T]) -> T:
    """Waits for what others may wait for too: cancelling this does not cancel that."""
    await asyncio.wait({task})
    if isinstance(failure := task.exception(), RequestFailed):
        raise RequestFailed(failure.code, failure.message)
    return task.result()


def _read(folder: Path) -> tuple[AdapterText, str]:
    text = AdapterText(folder)
    return text, text.digest
