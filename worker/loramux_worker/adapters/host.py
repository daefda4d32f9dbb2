"""The host tier: adapters in (pinned) memory, ready to be copied to the gpu pool.

Adapters are loaded by a few threads, which others help while there is little to load. An adapter's size is known once
its config and header are read, and room is made before its weights are: the tier never holds more than its capacity,
adapters being read included; one of the size of what is evicted for it has its memory too. What is wanted by a
sequence is loaded before what is only prefetched, in fair order, and is never evicted. A load that finds no room waits
outside the threads, and no wanted load overtakes another that waits for room, so a large adapter gets its turn.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import structlog
import torch
from torch import Tensor

from loramux_schemas import ErrorCode
from loramux_worker.adapters.adapter_plan import AdapterLimits, AdapterPlans
from loramux_worker.adapters.eviction import S3Fifo
from loramux_worker.adapters.host_memory import HostMemory
from loramux_worker.adapters.invalid import AdapterInvalid
from loramux_worker.adapters.layout import AdapterLayout
from loramux_worker.adapters.peft_format import AdapterFiles
from loramux_worker.adapters.targets import TargetModule
from loramux_worker.engine.protocol import AdapterReference
from loramux_worker.errors import RequestFailed

log = structlog.get_logger(__name__)

AdapterKey = tuple[str, str]
"""(adapter_id, revision)"""


@dataclass(frozen=True, slots=True, eq=False)
class HostAdapter:
    """An adapter in host memory: one run of elements in the served dtype, as `layout` says."""

    key: AdapterKey
    layout: AdapterLayout
    run: Tensor

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return self.layout.rank

    @property
    def num_bytes(self) -> int:
        """Bytes of the run."""
        return self.run.numel() * self.run.itemsize


class LoadResult(NamedTuple):
    """A load that ended: `error` is None when the adapter is in the host tier. `seconds` from the first asking."""

    key: AdapterKey
    error: RequestFailed | None
    seconds: float


@dataclass(slots=True, eq=False)
class _Load:
    reference: AdapterReference
    order: int
    asked_at: float
    num_bytes: int = 0  # known once the header has been read
    has_room: bool = False


def _use_one_core() -> None:
    """Loads run beside one another; were each to use all cores, they and the steps would wait for one another."""
    torch.set_num_threads(1)  # of this thread, and of threads that have computed nothing yet


class HostTier:
    """At most `capacity_bytes` of one model's adapters; S3-FIFO decides which of those that nobody waits for leave.

    Thread-safe, and no method waits for a disk.
    `pin` pins the memory, for copies to a CUDA device; `wake` is called, in any thread, when `poll` has news.
    """

    def __init__(
        self,
        capacity_bytes: int,
        targets: Sequence[TargetModule],
        limits: AdapterLimits,
        *,
        pin: bool = False,
        max_loads: int = 4,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self._plans = AdapterPlans(targets, limits)
        self._dtype = limits.dtype
        self._memory, self._scratch = HostMemory(pin=pin), HostMemory()
        self._wake = wake
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(max_loads, thread_name_prefix="adapter-load", initializer=_use_one_core)
        self._helpers = ThreadPoolExecutor(
            max(1, max_loads // 2), thread_name_prefix="adapter-read", initializer=_use_one_core
        )
        self._adapters: dict[AdapterKey, HostAdapter] = {}
        self._policy: S3Fifo[AdapterKey] = S3Fifo(capacity_bytes)
        self._wanted: dict[AdapterKey, float] = {}  # their turns: the least is loaded first
        self._queued: dict[AdapterKey, _Load] = {}  # a thread will take them
        self._running: dict[AdapterKey, _Load] = {}
        self._parked: dict[AdapterKey, _Load] = {}  # need room
        self._finished: deque[LoadResult] = deque()
        self._num_asked = 0
        self.bytes_used = 0
        self.hits_total = self.misses_total = self.evictions_total = 0

    @property
    def num_adapters(self) -> int:
        """Adapters in the tier, those being read not counted."""
        return len(self._adapters)

    @property
    def num_loading(self) -> int:
        """Loads that wait, run, or have ended without `poll` having told."""
        return len(self._queued) + len(self._running) + len(self._parked) + len(self._finished)

    def load(self, reference: AdapterReference) -> None:
        """Have the adapter brought in, unless it is here or on its way."""
        with self._lock:
            key = reference.key
            if key in self._adapters:
                self._policy.touch(key)
                self.hits_total += 1
            elif not self.is_loading(key):
                self.misses_total += 1
                self._num_asked += 1
                self._queue(_Load(reference, self._num_asked, time.monotonic()))

    def is_loading(self, key: AdapterKey) -> bool:
        """Whether a load waits or runs. Its result is there, for `poll`, as soon as this is False again."""
        return key in self._queued or key in self._running or key in self._parked

    def get(self, key: AdapterKey) -> HostAdapter | None:
        """The adapter if it is here."""
        with self._lock:
            return self._adapters.get(key)

    def want(self, key: AdapterKey, turn: float = 0.0) -> None:
        """A sequence waits for it: its load goes before prefetches, and once here it is not evicted.

        Of what is wanted, the load with the least `turn` goes first; the turn that was said first holds.
        """
        with self._lock:
            self._wanted.setdefault(key, turn)
            if key in self._parked:
                self._admit_parked()

    def unwant(self, key: AdapterKey) -> None:
        """No sequence waits for it any longer; it stays until its memory is needed."""
        with self._lock:
            if key in self._wanted:
                del self._wanted[key]
                self._admit_parked()

    def cancel(self, key: AdapterKey) -> None:
        """Drop a load that does not run yet, so that it does not take memory for nobody; no result follows."""
        with self._lock:
            queued = self._queued.pop(key, None)
            if queued is not None and queued.has_room:
                self.bytes_used -= queued.num_bytes
            self._parked.pop(key, None)
            self._admit_parked()

    def drop(self, key: AdapterKey) -> None:
        """Evict an adapter now."""
        with self._lock:
            if key in self._adapters:
                self._policy.remove(key)
                self._vacate(key)
                self._admit_parked()

    def poll(self) -> list[LoadResult]:
        """The loads that ended since the last call."""
        with self._lock:
            results = list(self._finished)
            self._finished.clear()
        return results

    def close(self) -> None:
        """Start no further load and wait for those that run."""
        with self._lock:
            self._queued.clear()
            self._parked.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._helpers.shutdown(wait=True)

    # The rest runs in the threads, or with the lock held where the name is about queues and room.

    def _run_next(self) -> None:
        with self._lock:
            load = min(self._queued.values(), key=self._precedence, default=None)
            if load is not None:
                key = load.reference.key
                self._running[key] = self._queued.pop(key)
        if load is None:  # cancelled
            self._trim_if_idle()
            return
        adapter: HostAdapter | None = None
        error: RequestFailed | None = None
        try:
            adapter = self._read(load)
            if adapter is None:
                self._trim_if_idle()
                return
        except RequestFailed as failure:
            error = failure
        except Exception as failure:  # our fault, or no memory: it must not end the thread unheard
            log.exception("adapter_load_failed", adapter_id=key[0], revision=key[1])
            error = RequestFailed(ErrorCode.INTERNAL, f"loading the adapter failed: {type(failure).__name__}")
        with self._lock:
            del self._running[key]
            if adapter is not None:
                self._adapters[key] = adapter
                self._policy.add(key, adapter.num_bytes)
            elif load.has_room:
                self.bytes_used -= load.num_bytes
            self._finished.append(LoadResult(key, error, time.monotonic() - load.asked_at))
            self._admit_parked()  # this one may be evictable, or have left its room
        self._trim_if_idle()
        self._wake()

    def _read(self, load: _Load) -> HostAdapter | None:
        """Read one adapter; None when there is no room for it yet and it was parked."""
        with AdapterFiles(Path(load.reference.path), self._plans) as files:
            num_bytes = files.layout.num_elements * self._dtype.itemsize
            if num_bytes > self.capacity_bytes:
                raise AdapterInvalid(f"it takes {num_bytes} bytes, the host tier has {self.capacity_bytes} in all")
            with self._lock:
                if not load.has_room:
                    load.num_bytes = num_bytes
                    if self._is_behind_a_parked(load) or not self._take_room(load):
                        self._parked[load.reference.key] = self._running.pop(load.reference.key)
                        return None
                assert load.num_bytes == num_bytes, "the files of a revision never change"
            run = self._memory.allocate(
                files.layout.num_elements,
                self._dtype,
                fill=lambda memory: files.read_into(memory, self._helpers, self._scratch),
            )
            return HostAdapter(load.reference.key, files.layout, run)

    def _trim_if_idle(self) -> None:
        with self._lock:
            idle = not self._queued and not self._running
        if idle:  # with the lock held, the engine would wait until it is unmapped
            self._memory.trim()
            self._scratch.trim()

    def _queue(self, load: _Load) -> None:
        self._memory.keep()  # of what is evicted for it
        self._scratch.keep()
        self._queued[load.reference.key] = load
        self._threads.submit(self._run_next)

    def _precedence(self, load: _Load) -> tuple[bool, float, int]:
        turn = self._wanted.get(load.reference.key)
        return (turn is None, turn or 0.0, load.order)

    def _is_behind_a_parked(self, load: _Load) -> bool:
        return any(self._precedence(parked) < self._precedence(load) for parked in self._parked.values())

    def _admit_parked(self) -> None:
        """Give room to parked loads in their order, until one does not fit."""
        while self._parked:
            load = min(self._parked.values(), key=self._precedence)
            if not self._take_room(load):
                return
            self._queue(self._parked.pop(load.reference.key))

    def _take_room(self, load: _Load) -> bool:
        """Take the load's bytes, evicting what is not wanted; False, and nothing changed: it would not do."""
        evictable = sum(adapter.num_bytes for key, adapter in self._adapters.items() if key not in self._wanted)
        if self.capacity_bytes - self.bytes_used + evictable < load.num_bytes:
            return False
        while self.capacity_bytes - self.bytes_used < load.num_bytes:
            victim = self._policy.evict(lambda key: key not in self._wanted)
            assert victim is not None, "enough may go"
            self._vacate(victim)
        self.bytes_used += load.num_bytes
        load.has_room = True
        return True

    def _vacate(self, key: AdapterKey) -> None:
        """Drop an adapter that the policy has forgotten."""
        self.bytes_used -= self._adapters.pop(key).num_bytes
        self.evictions_total += 1
