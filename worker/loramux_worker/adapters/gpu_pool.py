"""The gpu pool: adapters on the device, each one contiguous extent at its true rank.

The pool is one flat tensor. An adapter lies in it as on the host (`layout.py`), so kernels see contiguous tiles, and
a rank-4 adapter takes a rank-4 adapter's bytes. When the free elements would do but no hole does, adapters are moved
to join holes: a copy inside device memory takes microseconds. Kernels find the tiles through tables of offsets, which
every step reads anew, so an adapter may move between any two steps.

Moves and changes of the tables are enqueued on the device's current stream: behind the steps that were enqueued before
them and in front of those that come after. Copies from the host run beside those steps, on a stream of their own: they
wait only until nothing reads any longer what lay there before, and steps that are enqueued later wait for them. One
thread owns the pool.
"""

from __future__ import annotations

from collections import deque
from collections.abc import KeysView
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from loramux_worker.adapters.eviction import S3Fifo
from loramux_worker.adapters.extents import ExtentAllocator, Move
from loramux_worker.adapters.host import AdapterKey, HostAdapter
from loramux_worker.adapters.layout import AdapterLayout
from loramux_worker.adapters.own_weights import OwnWeights
from loramux_worker.adapters.slot_tables import PlacedModules, SlotTables
from loramux_worker.adapters.tiles import AdapterTiles, Tile
from loramux_worker.scheduler.tiers import Demand

_STAGING_ELEMENTS = 1 << 22


class _Moment(NamedTuple):
    """A point in the device's stream; of two, the one with the greater number is the later."""

    number: int
    event: torch.cuda.Event


@dataclass(slots=True, eq=False)
class _Resident:
    key: AdapterKey
    slot: int
    offset: int
    layout: AdapterLayout
    placed: PlacedModules
    pins: int = 0
    idle: _Moment | None = None  # since when nothing that is enqueued reads it
    tiles: AdapterTiles | None = None  # made when asked for, void after a move
    own: OwnWeights | None = None  # likewise
    scales: dict[str, Tensor] = field(default_factory=dict)


class AdapterPool:
    """At most `max_slots` adapters of `capacity_elements` in all; of the unpinned, S3-FIFO decides which leave.

    With a `demand`, adapters that sequences wait for leave after all others, those whose turn is last first.
    `tables` has what kernels need beside `elements`, the pool itself.
    """

    def __init__(
        self,
        capacity_elements: int,
        num_targets: int,
        max_slots: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.elements = torch.zeros(capacity_elements, dtype=dtype, device=device)
        self.tables = SlotTables(max_slots, num_targets, device)
        self.num_targets = num_targets
        self.demand: Demand | None = None
        self._staging = torch.empty(min(_STAGING_ELEMENTS, capacity_elements), dtype=dtype, device=device)
        self._extents = ExtentAllocator(capacity_elements)
        self._residents: dict[AdapterKey, _Resident] = {}
        self._policy: S3Fifo[AdapterKey] = S3Fifo(capacity_elements)
        self._by_slot: list[_Resident | None] = [None] * max_slots
        self._free_slots = list(range(max_slots))[::-1]
        self._being_copied: deque[tuple[torch.cuda.Event, HostAdapter]] = deque()
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._moments = 0
        self._vacated = self._now()  # from then on nothing reads what was given up; the zeros are on their way
        self.hits_total = self.misses_total = self.evictions_total = self.moves_total = 0

    @property
    def capacity_elements(self) -> int:
        """Elements of the whole pool."""
        return self._extents.capacity

    @property
    def bytes_used(self) -> int:
        """Bytes that resident adapters take."""
        return (self._extents.capacity - self._extents.num_free) * self.elements.itemsize

    @property
    def num_adapters(self) -> int:
        """Resident adapters."""
        return len(self._residents)

    def keys(self) -> KeysView[AdapterKey]:
        """The resident adapters."""
        return self._residents.keys()

    def slot_of(self, key: AdapterKey) -> int | None:
        """The adapter's slot, None when it is not resident."""
        resident = self._residents.get(key)
        return None if resident is None else resident.slot

    def rank_of(self, key: AdapterKey) -> int | None:
        """The largest rank of any of the adapter's modules, None when it is not resident."""
        resident = self._residents.get(key)
        return None if resident is None else resident.layout.rank

    def tiles(self, slot: int) -> AdapterTiles:
        """By target index, the tiles of the slot's adapter; valid until the next `load`."""
        resident = self._by_slot[slot]
        assert resident is not None, f"slot {slot} is free"
        if resident.tiles is None:
            layout = resident.layout
            run = self.elements[resident.offset :][: layout.num_elements]
            tiles: list[Tile | None] = [None] * self.num_targets
            for module in layout.modules:
                tiles[module.target] = (module.a(run), module.b(run))
            resident.tiles = AdapterTiles(tiles)
        return resident.tiles

    def own(self, slot: int) -> OwnWeights | None:
        """What the slot's adapter has beside LoRA, None if nothing; valid until the next `load`."""
        resident = self._by_slot[slot]
        assert resident is not None, f"slot {slot} is free"
        if resident.own is None and resident.layout.own:
            run = self.elements[resident.offset :][: resident.layout.num_elements]
            resident.own = OwnWeights(resident.layout.own, run, resident.scales)
        return resident.own

    def find(self, key: AdapterKey) -> int | None:
        """`slot_of` for use: a resident adapter counts as a hit and as used."""
        resident = self._residents.get(key)
        if resident is None:
            return None
        self.hits_total += 1
        self._policy.touch(key)
        return resident.slot

    def load(self, adapter: HostAdapter) -> int | None:
        """Copy an adapter into the pool, evicting as needed; its slot. None, and nothing changed: there is no room.

        One that is resident already stays where it is. With no adapter pinned, None means larger than the pool.
        """
        if (slot := self.find(adapter.key)) is not None:
            return slot
        size = adapter.layout.num_elements
        if not self._can_hold(size):
            return None
        while self._extents.num_free < size or not self._free_slots:
            self._vacate(self._forget_one())
        offset = self._allocate(size)
        slot = self._free_slots.pop()
        self._copy(adapter, self.elements[offset : offset + size])
        resident = _Resident(adapter.key, slot, offset, adapter.layout, PlacedModules.of(adapter.layout))
        self._residents[adapter.key] = self._by_slot[slot] = resident
        self._policy.add(adapter.key, size)
        self.tables.place(slot, resident.placed, offset)
        self.misses_total += 1
        return slot

    def pin(self, key: AdapterKey) -> None:
        """Keep a resident adapter until as many `unpin`s."""
        self._residents[key].pins += 1

    def unpin(self, key: AdapterKey) -> None:
        """Undo one `pin`."""
        resident = self._residents[key]
        assert resident.pins > 0, f"{key} is not pinned"
        resident.pins -= 1
        if not resident.pins:
            resident.idle = self._now()

    def evict(self, key: AdapterKey) -> None:
        """Remove a resident adapter that is not pinned; its slot then means no adapter."""
        assert not self._residents[key].pins, f"{key} is pinned"
        self._policy.remove(key)
        self._vacate(key)

    def _forget_one(self) -> AdapterKey:
        """Choose an adapter that may leave, and let the policy forget it. There must be one."""
        unpinned = {key for key, resident in self._residents.items() if not resident.pins}
        demand = self.demand
        unneeded = unpinned if demand is None else {key for key in unpinned if not demand.waits(key)}
        if unneeded:
            victim = self._policy.evict(unneeded.__contains__)
            assert victim is not None, "one of them may go"
            return victim
        assert demand is not None, "no adapter is unpinned"
        victim = max(unpinned, key=lambda key: demand.turn(key[0]))
        self._policy.remove(victim)
        return victim

    def _vacate(self, key: AdapterKey) -> None:
        """Free what an adapter took that the policy has forgotten."""
        resident = self._residents.pop(key)
        self._extents.free(resident.offset)
        self._vacated = max(filter(None, (self._vacated, resident.idle)), default=None)
        self._by_slot[resident.slot] = None
        self._free_slots.append(resident.slot)
        self.tables.clear(resident.slot)
        self.evictions_total += 1

    def check_integrity(self) -> None:
        """Raise AssertionError unless extents, slots and tables say the same. Reads the device's tables back."""
        self._extents.check_integrity()
        residents = list(self._residents.values())
        extents = {(resident.offset, resident.layout.num_elements) for resident in residents}
        assert extents == set(self._extents.taken)
        assert len(extents) == len(residents) == len(self._policy)
        slots = [resident.slot for resident in residents]
        assert sorted(slots + self._free_slots) == list(range(len(self._by_slot)))
        tables = self.tables
        expected = SlotTables(len(self._by_slot), self.num_targets, torch.device("cpu"))
        for resident in residents:
            assert self._by_slot[resident.slot] is resident
            assert resident.pins >= 0
            expected.place(resident.slot, resident.placed, resident.offset)
        for name in ("a_offsets", "b_offsets", "ranks"):
            on_device = getattr(tables, name).cpu()
            assert torch.equal(on_device, getattr(expected, name)), f"{name} on the device is wrong"
            assert (on_device.numpy() == getattr(tables, f"host_{name}")).all(), f"{name} on the host is wrong"

    def _can_hold(self, size: int) -> bool:
        evictable = [r.layout.num_elements for r in self._residents.values() if not r.pins]
        return self._extents.num_free + sum(evictable) >= size and bool(self._free_slots or evictable)

    def _allocate(self, size: int) -> int:
        """Take an extent where enough elements are free, moving others if they are not in one place."""
        offset = self._extents.allocate(size)
        if offset is None:
            by_offset = {resident.offset: resident for resident in self._residents.values()}
            for move in self._extents.plan_moves(size):
                self._move(by_offset[move.extent.offset], move)
            offset = self._extents.allocate(size)
            assert offset is not None, "the moves opened a hole"
        return offset

    def _move(self, resident: _Resident, move: Move) -> None:
        """Slide an adapter down, piece by piece from its start, through the staging buffer where pieces overlap."""
        (source, size), to = move.extent, move.to
        distance = source - to
        longest = max(distance, self._staging.numel())
        for at in range(0, size, longest):
            count = min(longest, size - at)
            piece = self.elements[source + at :][:count]
            if count > distance:
                piece = self._staging[:count].copy_(piece)
            self.elements[to + at :][:count].copy_(piece)
        self._extents.apply(move)
        self._vacated = self._now()
        resident.offset, resident.tiles, resident.own = to, None, None
        self.tables.place(resident.slot, resident.placed, to)
        self.moves_total += 1

    def _now(self) -> _Moment | None:
        """What is enqueued until now is over then; None where it is over already."""
        if self._copies is None:
            return None
        event = torch.cuda.Event()
        event.record()
        self._moments += 1
        return _Moment(self._moments, event)

    def _copy(self, adapter: HostAdapter, target: Tensor) -> None:
        """Start the copy of an adapter, whose memory on the host must not be returned before its end."""
        if self._copies is None:
            target.copy_(adapter.run)
            return
        while self._being_copied and self._being_copied[0][0].query():
            self._being_copied.popleft()
        if self._vacated is not None:
            self._copies.wait_event(self._vacated.event)
        with torch.cuda.stream(self._copies):
            target.copy_(adapter.run, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(self._copies)
        torch.cuda.current_stream().wait_event(copied)
        self._being_copied.append((copied, adapter))
