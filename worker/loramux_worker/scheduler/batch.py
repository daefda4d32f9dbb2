"""The running sequences: those that hold blocks of the KV cache and pins of their adapters."""

from __future__ import annotations

from collections import Counter
from enum import Enum

from loramux_worker.engine.kv_cache import BlockPool
from loramux_worker.engine.sequence import Sequence, SequenceStatus
from loramux_worker.scheduler.client import Client, Lane
from loramux_worker.scheduler.config import SchedulerConfig
from loramux_worker.scheduler.rank_budget import RankBudget
from loramux_worker.scheduler.step import Chunk
from loramux_worker.scheduler.tiers import AdapterTiers


class Seat:
    """A running sequence, its client, and the chunk that it gets in each step while it decodes."""

    __slots__ = ("chunk", "client", "sequence")

    def __init__(self, sequence: Sequence, client: Client) -> None:
        self.sequence = sequence
        self.client = client
        self.chunk = Chunk(sequence, 1)


class Joining(Enum):
    """What became of a sequence that wanted to join the batch."""

    JOINED = "joined"
    NO_BLOCKS = "the KV cache is too full"
    NO_ROOM = "no room for its adapter, in the sum of ranks or in the gpu pool"
    LOADING = "its adapter is on its way to the host tier"


class Batch:
    """Running sequences, and everything that bounds how many they are.

    A sequence that joins is given blocks for all tokens it has, so that only decoding can run short of them. Joining
    leaves one block in a hundred free, at least one: without it, the first decode step after an admission would
    preempt what was just admitted. Into an empty batch it leaves none, so that a sequence as long as the cache runs.

    One seat in sixteen is kept for those who have few: whoever asks now and then finds one at once, and need not wait
    until sequences end of an adapter that would fill the batch.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockPool, adapters: AdapterTiers) -> None:
        self.seats: dict[int, Seat] = {}
        self.ranks = RankBudget(config.max_batch_ranks)
        self._max_running = config.max_running
        self._blocks = blocks
        self._block_size = blocks.block_size
        self._adapters = adapters
        self._reserved_blocks = max(1, blocks.num_blocks // 100)
        self._reserved_seats = config.max_running // 16

    def __len__(self) -> int:
        return len(self.seats)

    @property
    def is_full(self) -> bool:
        """Whether as many sequences run as may."""
        return len(self.seats) >= self._max_running

    def has_seat(self, lane: Lane, waiting: int) -> bool:
        """Whether a free seat is for the lane: many are, or enough for all `waiting` sequences; or its client has few.

        Few are less than an equal share, were one adapter more here than there are.
        """
        free = self._max_running - len(self.seats)
        if free > self._reserved_seats or waiting <= free:
            return True
        others = len(self.ranks.adapters) - (lane.key in self.ranks.adapters)
        return lane.client.in_service * (others + 2) < self._max_running

    def join(self, lane: Lane) -> Joining:
        """Let the head of a lane run: take its blocks, pin its adapter. Unless it JOINED, nothing has changed."""
        sequence, key = lane.head, lane.key
        num_blocks = self._blocks.blocks_needed(sequence.num_tokens)
        if not self._blocks.can_allocate(num_blocks + (self._reserved_blocks if self.seats else 0)):
            return Joining.NO_BLOCKS
        if key is not None:
            rank = self.ranks.rank(key)
            if rank is None:
                rank = self._adapters.rank(key)
            if rank is None:
                return Joining.LOADING
            if not self.ranks.fits(key, rank) or not self._adapters.acquire(key):
                return Joining.NO_ROOM
            self.ranks.add(key, rank)
        sequence.block_table.extend(self._blocks.allocate(num_blocks))
        sequence.status = SequenceStatus.RUNNING
        self.seats[sequence.sequence_id] = Seat(sequence, lane.client)
        return Joining.JOINED

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence out of the batch: its blocks are free, its adapter loses a pin."""
        del self.seats[sequence.sequence_id]
        self._blocks.free(sequence.block_table)
        sequence.block_table.clear()
        sequence.num_computed_tokens = 0
        key = sequence.adapter_key
        if key is not None:
            self.ranks.remove(key)
            self._adapters.release(key)

    def grow(self, sequence: Sequence) -> bool:
        """Make sure of a block for every token that the sequence has. False: no block is free."""
        num_missing = sequence.num_tokens - len(sequence.block_table) * self._block_size
        if num_missing <= 0:
            return True
        num_blocks = self._blocks.blocks_needed(num_missing)
        if not self._blocks.can_allocate(num_blocks):
            return False
        sequence.block_table.extend(self._blocks.allocate(num_blocks))
        return True

    def is_rider(self, lane: Lane) -> bool:
        """Whether running the lane's sequences adds no adapter."""
        return lane.key is None or lane.key in self.ranks.adapters

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, ranks and running sequences agree."""
        self._blocks.check_integrity()
        sequences = [seat.sequence for seat in self.seats.values()]
        held = [block for sequence in sequences for block in sequence.block_table]
        assert len(held) == len(set(held)), "two sequences hold one block"
        assert len(held) == self._blocks.num_used, "a block is in use that no sequence holds"
        assert len(sequences) <= self._max_running
        for sequence in sequences:
            assert sequence.status is SequenceStatus.RUNNING
            slots = len(sequence.block_table) * self._block_size
            assert sequence.num_computed_tokens <= min(sequence.num_tokens, slots)
        users = Counter(sequence.adapter_key for sequence in sequences if sequence.adapter_key is not None)
        assert users.keys() == self.ranks.adapters, "the batch counts an adapter that nobody uses"
        assert all(self.ranks.num_sequences(key) == num for key, num in users.items())
        assert self.ranks.used == sum(self.ranks.rank(key) or 0 for key in users)
        assert self.ranks.used <= self.ranks.max_ranks or len(users) == 1
