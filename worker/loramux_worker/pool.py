"""The engines of a worker, and which of them gets a request."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from loramux_worker.engine.config import EngineConfig
from loramux_worker.engine.protocol import AdapterMoved, AdapterReference, Ready, SamplingParameters, Stats, Submit
from loramux_worker.engine_client import EngineClient
from loramux_worker.generation import Generation

log = structlog.get_logger(__name__)

_IMBALANCE = 8  # sequences by which the engine nearest to an adapter may be the busier one


class EnginePool:
    """Starts engines, keeps them alive and sends each request to the one that has its adapter nearest.

    Two engines are an adapter's homes, by rendezvous hashing; the first takes its requests unless it is the busier
    by more than a bound (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001). `on_move` is
    told of each adapter that has come into a tier of one of them.
    """

    def __init__(
        self, configs: Sequence[EngineConfig], on_move: Callable[[AdapterMoved], None] = lambda moved: None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="loramux-")
        self._ids = itertools.count(1)
        merged = configs[0].merge_adapter
        self._merged = None if merged is None else merged.key
        folder = Path(self._folder.name)
        self._engines = [EngineClient(index, config, folder, on_move) for index, config in enumerate(configs)]

    async def start(self) -> None:
        """Start every engine and wait until all take requests.

        Raises:
            ConfigurationError: an engine refused its settings or ended while starting.
        """
        await asyncio.gather(*(engine.start() for engine in self._engines))

    async def close(self) -> None:
        """End every engine; generations that are not done fail."""
        await asyncio.gather(*(engine.close() for engine in self._engines))
        self._folder.cleanup()

    @property
    def is_ready(self) -> bool:
        """Whether at least one engine takes requests."""
        return any(engine.is_ready for engine in self._engines)

    @property
    def limits(self) -> Ready:
        """What the engines can do; all run the same model."""
        ready = self._engines[0].ready
        assert ready is not None, "asked after start()"
        return ready

    @property
    def stats(self) -> list[Stats]:
        """The latest picture of each engine that has sent one."""
        return [engine.stats for engine in self._engines if engine.stats is not None]

    @property
    def restarts(self) -> int:
        """Engine processes that died and were started again."""
        return sum(engine.restarts for engine in self._engines)

    def submit(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParameters,
        adapter: AdapterReference | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
        fewest_tokens: int = 1,
    ) -> Generation:
        """Give a request to an engine; `deadline` is Unix time in seconds, `fewest_tokens` it generates for sure."""
        generation = Generation(
            Submit(
                next(self._ids),
                prompt_token_ids,
                sampling,
                adapter,
                priority,
                deadline,
                fewest_tokens=fewest_tokens,
            )
        )
        self._nearest(adapter).submit(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """Stop a generation, in whatever state; it says nothing more."""
        for engine in self._engines:
            engine.cancel(generation)

    def prefetch(self, adapter: AdapterReference) -> None:
        """Tell the engine that will get this adapter's requests to bring it into memory."""
        self._nearest(adapter).prefetch(adapter)

    def _nearest(self, adapter: AdapterReference | None) -> EngineClient:
        if adapter is None or adapter.key == self._merged or len(self._engines) == 1:  # every engine has it
            return min(self._engines, key=lambda e: e.in_flight)
        first, second = sorted(self._engines, key=lambda e: _affinity(adapter, e.index), reverse=True)[:2]
        return second if first.in_flight > second.in_flight + _IMBALANCE else first


def _affinity(adapter: AdapterReference, engine: int) -> bytes:
    return hashlib.blake2b(f"{adapter.adapter_id}\0{engine}".encode(), digest_size=8).digest()
