"""Where an adapter is, host tier or gpu pool, and getting it from one to the other."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from loramux_kernels.lora_plan import NO_ADAPTER
from loramux_schemas import ErrorCode
from loramux_worker.adapters.correction import Correction
from loramux_worker.adapters.gpu_pool import AdapterPool
from loramux_worker.adapters.host import AdapterKey, HostAdapter, HostTier, LoadResult
from loramux_worker.adapters.invalid import AdapterInvalid
from loramux_worker.adapters.own_weights import OwnWeights
from loramux_worker.adapters.tiles import AdapterTiles
from loramux_worker.engine.protocol import AdapterMoved, AdapterReference
from loramux_worker.errors import ConfigurationError, RequestFailed
from loramux_worker.scheduler.tiers import Demand

_MAX_REFERENCES = 65_536
_BASE = ("", "")  # what corrects the base model goes by this key, which is no adapter's


class AdapterResidency:
    """What the engine and its scheduler know of adapters. One thread owns it.

    An adapter that a sequence waits for is kept in the host tier until it is in the pool; there it needs no copy on
    the host. So memory is never held for what cannot run, and what waits for memory gets it as sequences run.

        prefetch → (loading) → poll → rank → acquire → slot, tiles → release → forget

    `on_move` is told of each adapter that has come into a tier.

    With a `correction`, its adapter is merged into the base weights: that one is always here, has no rank and needs no
    slot, while the base model has one that is never evicted. The host tier corrects all others as it reads them.

    Raises ConfigurationError when the pool has no room for the correction.
    """

    def __init__(
        self,
        host: HostTier,
        pool: AdapterPool,
        on_move: Callable[[AdapterMoved], None] = lambda moved: None,
        correction: Correction | None = None,
    ) -> None:
        self.host = host
        self.pool = pool
        self._on_move = on_move
        self._references: OrderedDict[AdapterKey, AdapterReference] = OrderedDict()  # least recently named first
        self._wanted: set[AdapterKey] = set()
        self._unknown: list[AdapterKey] = []
        self._demand: Demand | None = None
        self._correction = correction
        self._base_slot = NO_ADAPTER if correction is None else self._keep(correction)

    @property
    def num_in_pool(self) -> int:
        """Adapters in the pool; what corrects the base model is none."""
        return self.pool.num_adapters - (self._correction is not None)

    def follow(self, demand: Demand) -> None:
        """Load first what is served first; evict from the pool what nobody waits for, then what is served last."""
        self._demand = self.pool.demand = demand

    def prefetch(self, reference: AdapterReference) -> None:
        """Have an adapter brought in, unless it is here or on its way; a load that failed is tried again.

        Remembers where its files are, so that `rank` can bring it back after an eviction: until `forget`, or until
        very many others were named that no sequence waited for either.
        """
        if self._is_merged(reference.key):
            return
        self._remember(reference)
        if self.pool.slot_of(reference.key) is None:
            self.host.load(reference)

    def expect(self, reference: AdapterReference) -> None:
        """`prefetch` for a sequence that has come: where it finds the adapter, that is no second use of it.

        Counted twice, whatever is asked for once would seem worth keeping.
        """
        if self._is_merged(reference.key):
            return
        self._remember(reference)
        if self.pool.slot_of(reference.key) is None and self.host.get(reference.key) is None:
            self.host.load(reference)

    @property
    def is_loading(self) -> bool:
        """Whether `poll` will have something to tell soon."""
        return self.host.num_loading > 0 or bool(self._unknown)

    def rank(self, key: AdapterKey) -> int | None:
        """The adapter's rank if it is in the pool or the host tier, where it then stays until it is acquired.

        None: it is on its way, and `poll` will tell how that ended.
        """
        if self._is_merged(key):
            return 0
        rank = self.pool.rank_of(key)
        if rank is not None:
            return rank
        self._wanted.add(key)
        self.host.want(key, 0.0 if self._demand is None else self._demand.turn(key[0]))
        if (adapter := self.host.get(key)) is not None:
            return adapter.rank
        if not self.host.is_loading(key):
            self._load_again(key)
        return None

    def acquire(self, key: AdapterKey) -> bool:
        """Make the adapter resident in the pool and pin it; False, and nothing changed: no room, or not loaded."""
        if self._is_merged(key):
            return True
        if self.pool.find(key) is None:
            adapter, started = self.host.get(key), time.monotonic()
            if adapter is None or self.pool.load(adapter) is None:
                return False
            self._moved(key, "gpu", time.monotonic() - started)
        self.pool.pin(key)
        self._unwant(key)
        return True

    def release(self, key: AdapterKey) -> None:
        """Undo one `acquire`."""
        if not self._is_merged(key):
            self.pool.unpin(key)

    def slot(self, key: AdapterKey | None) -> int:
        """The pool slot of an acquired adapter, or of the base model (None); `NO_ADAPTER` where none is needed."""
        if key is None:
            return self._base_slot
        if self._is_merged(key):
            return NO_ADAPTER
        slot = self.pool.slot_of(key)
        assert slot is not None, f"{key} is not resident"
        return slot

    def tiles(self, slot: int) -> AdapterTiles:
        """By target index, A [rank, in] and scaled Bᵀ [rank, out] of the slot's adapter; valid for one step."""
        return self.pool.tiles(slot)

    def own(self, slot: int) -> OwnWeights | None:
        """What the slot's adapter has beside LoRA, None if nothing; valid for one step."""
        return self.pool.own(slot)

    def poll(self) -> list[LoadResult]:
        """The loads that ended since the last call, each once."""
        results = [self._check_fits_pool(result) for result in self.host.poll()]
        results += [
            LoadResult(key, RequestFailed(ErrorCode.ADAPTER_UNAVAILABLE, "the adapter is no longer known here"), 0.0)
            for key in self._unknown
        ]
        self._unknown.clear()
        for result in results:
            if result.error is None:
                self._moved(result.key, "host", result.seconds)
        return results

    def forget(self, key: AdapterKey) -> None:
        """No sequence wants the adapter any longer, running or waiting: it may go from both tiers."""
        self._unwant(key)
        self.host.cancel(key)
        self._references.pop(key, None)

    def close(self) -> None:
        """Stop loading."""
        self.host.close()

    def _is_merged(self, key: AdapterKey) -> bool:
        return self._correction is not None and self._correction.key == key

    def _keep(self, correction: Correction) -> int:
        slot = self.pool.load(HostAdapter(_BASE, correction.layout, correction.run))
        if slot is None:
            raise ConfigurationError(
                f"--adapter-memory {self._pool_bytes}: what takes --merge-adapter off the base model again needs "
                f"{correction.run.nbytes} bytes of it; say more"
            )
        self.pool.pin(_BASE)
        self.pool.misses_total = 0  # nobody has asked for anything
        return slot

    @property
    def _pool_bytes(self) -> int:
        return self.pool.capacity_elements * self.pool.elements.itemsize

    def _remember(self, reference: AdapterReference) -> None:
        self._references[reference.key] = reference
        self._references.move_to_end(reference.key)
        if len(self._references) > _MAX_REFERENCES:
            self._drop_oldest_unwanted_reference()

    def _moved(self, key: AdapterKey, tier: str, seconds: float) -> None:
        if (reference := self._references.get(key)) is not None:  # None: nobody waits for it any longer
            self._on_move(AdapterMoved(reference, tier, time.time(), seconds))

    def _unwant(self, key: AdapterKey) -> None:
        if key in self._wanted:
            self._wanted.remove(key)
            self.host.unwant(key)

    def _load_again(self, key: AdapterKey) -> None:
        reference = self._references.get(key)
        if reference is not None:
            self.host.load(reference)
        elif key not in self._unknown:
            self._unknown.append(key)

    def _check_fits_pool(self, result: LoadResult) -> LoadResult:
        adapter = self.host.get(result.key)
        have = self._pool_bytes - (0 if self._correction is None else self._correction.run.nbytes)
        if adapter is None or adapter.num_bytes <= have:
            return result
        self.host.drop(result.key)
        error = AdapterInvalid(f"it takes {adapter.num_bytes} bytes, the gpu pool has {have} in all")
        return result._replace(error=error)

    def _drop_oldest_unwanted_reference(self) -> None:
        for key in self._references:
            if key not in self._wanted and self.pool.slot_of(key) is None:
                del self._references[key]
                return
