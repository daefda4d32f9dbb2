"""Stand-ins around the scheduler: adapter tiers with few slots and slow loads, an engine that makes tokens up."""

from __future__ import annotations

from collections import Counter, defaultdict
from operator import or_

from loramux_worker.engine.kv_cache import BlockPool
from loramux_worker.engine.protocol import AdapterReference, SamplingParameters
from loramux_worker.engine.sequence import Sequence, SequenceStatus
from loramux_worker.scheduler import AdapterKey, Demand, Policies, Scheduler, SchedulerConfig, Step


def make_sequence(
    sequence_id: int,
    adapter_id: str | None = None,
    *,
    prompt: int = 4,
    new: int = 4,
    revision: str = "r1",
    priority: int = 0,
    deadline: float | None = None,
) -> Sequence:
    """A sequence of `prompt` tokens that wants `new` more."""
    return Sequence(
        sequence_id,
        list(range(prompt)),
        SamplingParameters(max_new_tokens=new),
        None if adapter_id is None else AdapterReference(adapter_id, revision, ""),
        priority=priority,
        deadline=deadline,
    )


class FakeTiers:
    """A gpu pool of `slots` adapters over a host tier; with `slow_loads`, loads end when the test says so."""

    def __init__(self, slots: int = 64, ranks: dict[str, int] | None = None, *, slow_loads: bool = False) -> None:
        self.slots = slots
        self.ranks = ranks or {}
        self.slow_loads = slow_loads
        self.host: set[AdapterKey] = set()
        self.loading: dict[AdapterKey, None] = {}
        self.resident: dict[AdapterKey, None] = {}  # least recently acquired first
        self.pins: Counter[AdapterKey] = Counter()

    def follow(self, demand: Demand) -> None:
        self.demand = demand

    def true_rank(self, key: AdapterKey) -> int:
        return self.ranks.get(key[0], 8)

    def rank(self, key: AdapterKey) -> int | None:
        if self.slow_loads and key not in self.host and key not in self.resident:
            self.loading[key] = None
            return None
        return self.true_rank(key)

    def acquire(self, key: AdapterKey) -> bool:
        if key not in self.resident and len(self.resident) >= self.slots:
            evictable = next((other for other in self.resident if not self.pins[other]), None)
            if evictable is None:
                return False
            del self.resident[evictable]
        self.resident.pop(key, None)
        self.resident[key] = None
        self.pins[key] += 1
        return True

    def release(self, key: AdapterKey) -> None:
        self.pins[key] -= 1
        assert self.pins[key] >= 0, "released more often than acquired"

    def end_load(self, key: AdapterKey) -> None:
        del self.loading[key]
        self.host.add(key)


class FakeEngine:
    """Runs the steps of a scheduler, checks each, and keeps account of the service that every adapter got."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        num_blocks: int = 256,
        block_size: int = 4,
        tiers: FakeTiers | None = None,
        policies: Policies | None = None,
    ) -> None:
        self.config = config
        self.blocks = BlockPool(num_blocks, block_size)
        self.tiers = tiers or FakeTiers()
        self.scheduler = Scheduler(config, self.blocks, self.tiers, policies)
        self.num_steps = 0
        self.num_preemptions = 0
        self.finished: list[Sequence] = []
        self.sequences: dict[int, Sequence] = {}
        self.services: defaultdict[str | None, float] = defaultdict(float)
        self.started_at: dict[int, int] = {}
        self._read: dict[int, int] = {}
        self._live: list[Sequence] = []

    def add(self, adapter_id: str | None = None, **values: object) -> Sequence:
        return self.submit(make_sequence(len(self.sequences), adapter_id, **values))  # type: ignore[arg-type]

    def submit(self, sequence: Sequence) -> Sequence:
        self.scheduler.add(sequence)
        self.sequences[sequence.sequence_id] = sequence
        self._live.append(sequence)
        return sequence

    def step(self) -> Step:
        """One checked step: schedule, forward pass, advance, append, finish."""
        scheduler = self.scheduler
        step = scheduler.schedule(float(self.num_steps))
        self.check(step)
        samples = [chunk.sequence for chunk in step.chunks if chunk.samples]
        for sequence, num_tokens in step.chunks:
            self._account(sequence, num_tokens, sequence in samples)
            self.started_at.setdefault(sequence.sequence_id, self.num_steps)
        scheduler.advance(step)
        for sequence in samples:
            sequence.generated_token_ids.append(len(sequence.generated_token_ids))
            longest = sequence.num_tokens > self.config.max_model_len
            if len(sequence.generated_token_ids) == sequence.sampling.max_new_tokens or longest:
                scheduler.finish(sequence)
                self.finished.append(sequence)
        self.num_steps += 1
        self.num_preemptions += len(step.preempted)
        return step

    def drain(self, max_steps: int) -> None:
        """Run until nothing is left; loads end at once."""
        for _ in range(max_steps):
            for key in list(self.tiers.loading):
                self.tiers.end_load(key)
                self.scheduler.adapter_loaded(key)
            self.step()
            if not self.scheduler.num_running and not self.scheduler.num_waiting:
                break
        assert not self.scheduler.num_running
        assert not self.scheduler.num_waiting
        assert self.blocks.num_used == 0
        assert not +self.tiers.pins
        self.scheduler.check_integrity()

    def check(self, step: Step) -> None:
        """A step keeps every bound, leaves no decoding sequence out, and is not empty while something could run."""
        self.scheduler.check_integrity()
        chunks = {chunk.sequence: chunk.num_tokens for chunk in step.chunks}
        assert len(chunks) == len(step.chunks), "a sequence has two chunks"
        assert sum(chunks.values()) <= self.config.max_batched_tokens
        assert self.scheduler.num_running <= self.config.max_batch_sequences
        for sequence, num_tokens in chunks.items():
            assert sequence.status is SequenceStatus.RUNNING
            assert 1 <= num_tokens <= sequence.num_uncomputed_tokens
            end = sequence.num_computed_tokens + num_tokens
            assert self.blocks.blocks_needed(end) <= len(sequence.block_table)
        for sequence in step.preempted:
            assert sequence.status is SequenceStatus.WAITING
            assert sequence not in chunks
        self._live = [s for s in self._live if s.status is not SequenceStatus.FINISHED]
        running = [s for s in self._live if s.status is SequenceStatus.RUNNING]
        assert all(s in chunks for s in running if s.num_uncomputed_tokens == 1)
        self._check_adapters(running)
        if not chunks:
            assert not running
            queue = self.scheduler.queue
            clients = [queue.client(s.adapter_key and s.adapter_key[0]) for s in self._live]
            held = [client is not None and client.is_held for client in clients]
            loading = [s.adapter_key in self.tiers.loading for s in self._live]
            assert all(map(or_, held, loading)), "the engine idles"

    def _check_adapters(self, running: list[Sequence]) -> None:
        users = Counter(s.adapter_key for s in running if s.adapter_key is not None)
        assert users == +self.tiers.pins, "pins and running sequences differ"
        assert all(key in self.tiers.resident for key in users)
        assert len(self.tiers.resident) <= self.tiers.slots
        ranks = sum(map(self.tiers.true_rank, users))
        assert ranks <= self.config.max_batch_ranks or len(users) == 1

    def _account(self, sequence: Sequence, num_tokens: int, samples: bool) -> None:
        """Service as the definition says it: each prompt token once, each sampled token."""
        end = min(sequence.num_computed_tokens + num_tokens, sequence.num_prompt_tokens)
        before = self._read.get(sequence.sequence_id, 0)
        self._read[sequence.sequence_id] = max(before, end)
        service = self.config.prompt_weight * max(0, end - before) + self.config.generated_weight * samples
        self.services[None if sequence.adapter is None else sequence.adapter.adapter_id] += service


def make_engine(tiers: FakeTiers | None = None, num_blocks: int = 256, **values: object) -> FakeEngine:
    config = SchedulerConfig(**{"max_model_len": 256, **values})  # type: ignore[arg-type]
    return FakeEngine(config, num_blocks=num_blocks, tiers=tiers)


def given(step: Step) -> dict[int, int]:
    return {chunk.sequence.sequence_id: chunk.num_tokens for chunk in step.chunks}


def run_until_finished(engine: FakeEngine, sequence: Sequence, max_steps: int = 1000) -> int:
    """Steps until the sequence has finished."""
    for number in range(max_steps):
        if sequence.status is SequenceStatus.FINISHED:
            return number
        engine.step()
    raise AssertionError("the sequence does not finish")
