"""One policy over one trace, in simulated time, and what came of it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from fairness_engine import SimulatedTiers, StepCosts
from fairness_policies import Policy
from fairness_traces import Arrival, Trace

from loramux_worker.engine.protocol import AdapterReference, SamplingParameters
from loramux_worker.engine.sequence import Sequence
from loramux_worker.scheduler import Step

PROMPT_WEIGHT, GENERATED_WEIGHT = 1.0, 2.0
WINDOW = 2.0  # seconds over which the service of backlogged adapters is compared


@dataclass(slots=True)
class Shares:
    """Service of adapters that have something loaded waiting during a whole window."""

    here: Callable[[str], bool]
    ends: float = WINDOW
    backlogged: set[str] = field(default_factory=set)
    service: Counter[str] = field(default_factory=Counter)
    jain: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def roll(self, now: float, waiting: Counter[str]) -> None:
        """Close the window if it is over, and begin the next."""
        if now < self.ends:
            return
        got = [self.service[adapter_id] for adapter_id in self.backlogged]
        if len(got) > 1:
            squares = sum(x * x for x in got)
            self.jain.append(sum(got) ** 2 / (len(got) * squares) if squares else 1.0)
            self.gaps.append(max(got) - min(got))
        self.service.clear()
        self.backlogged = {adapter_id for adapter_id, num in waiting.items() if num and self.here(adapter_id)}
        self.ends = now + WINDOW


class Run:
    """Feeds the arrivals to a policy, runs its steps at the simulated engine's pace, and keeps account."""

    def __init__(self, trace: Trace, policy: Policy, tiers: SimulatedTiers, costs: StepCosts, seconds: float) -> None:
        self._trace, self._policy, self._tiers, self._costs, self._seconds = trace, policy, tiers, costs, seconds
        self._ranks = trace.ranks()
        self._now = self._last_step = 0.0
        self._waiting: Counter[str] = Counter()
        self._begun: set[int] = set()
        self._arrived: dict[int, Arrival] = {}
        self._first_tokens: dict[int, float] = {}
        self._shares = Shares(lambda adapter_id: tiers.is_here((adapter_id, "r")))
        self._tokens = self._steps = self._ranks_total = 0
        self._light_left = sum(a.adapter_id in trace.light for a in trace.arrivals)

    def figures(self) -> dict[str, float]:
        """Run until every light request has its first token, but no longer than twice the trace; then the figures."""
        arrivals = list(reversed(self._trace.arrivals))
        while (arrivals or self._light_left) and self._now < 2 * self._seconds:
            while arrivals and arrivals[-1].at <= self._now:
                self._submit(arrivals.pop())
            self._tiers.now = self._now
            for key in self._tiers.poll():
                self._policy.adapter_loaded(key)
            self._shares.roll(self._now, self._waiting)
            step = self._policy.schedule(self._now)
            if step.chunks:
                self._compute(step)
            else:
                self._last_step = 0.0
                self._now = min(arrivals[-1].at if arrivals else float("inf"), self._tiers.next_load)
        return self._summary()

    def _submit(self, arrival: Arrival) -> None:
        number = len(self._arrived)
        self._arrived[number] = arrival
        self._waiting[arrival.adapter_id] += 1
        self._policy.add(
            Sequence(
                number,
                [1] * arrival.prompt,
                SamplingParameters(max_new_tokens=arrival.new),
                AdapterReference(arrival.adapter_id, "r", ""),
                submitted_at=self._now,
            )
        )
        self._tiers.poll()

    def _compute(self, step: Step) -> None:
        """Let the step take its time, and give every sequence that it brings to its end a token."""
        ranks = {key: self._ranks[key[0]] for chunk in step.chunks if (key := chunk.sequence.adapter_key) is not None}
        # copies go on beside the step before, which began when this one was made
        late_copies = max(0.0, self._tiers.take_copy_seconds() - self._last_step)
        self._last_step = self._costs.seconds(step, ranks)
        self._now += late_copies + self._last_step
        within = self._now <= self._seconds
        samples = []
        for chunk in step.chunks:
            sequence, num_tokens = chunk
            adapter_id = self._arrived[sequence.sequence_id].adapter_id
            sampled = chunk.samples
            num_prompt = min(num_tokens, sequence.num_prompt_tokens - sequence.num_computed_tokens)
            self._shares.service[adapter_id] += PROMPT_WEIGHT * max(0, num_prompt) + GENERATED_WEIGHT * sampled
            self._tokens += within * (max(0, num_prompt) + sampled)
            if sequence.sequence_id not in self._begun:
                self._begin(sequence.sequence_id, adapter_id)
            if sampled:
                samples.append(sequence)
        self._policy.advance(step)
        self._steps += within
        self._ranks_total += within * sum(ranks.values())
        for sequence in samples:
            self._sample(sequence)

    def _begin(self, sequence_id: int, adapter_id: str) -> None:
        self._begun.add(sequence_id)
        self._waiting[adapter_id] -= 1
        if not self._waiting[adapter_id]:
            self._shares.backlogged.discard(adapter_id)

    def _sample(self, sequence: Sequence) -> None:
        if sequence.sequence_id not in self._first_tokens:
            self._first_tokens[sequence.sequence_id] = self._now
            self._light_left -= self._arrived[sequence.sequence_id].adapter_id in self._trace.light
        sequence.generated_token_ids.append(1)
        if len(sequence.generated_token_ids) == sequence.sampling.max_new_tokens:
            self._policy.finish(sequence)

    def _summary(self) -> dict[str, float]:
        waits = sorted(
            self._first_tokens.get(number, self._now) - arrival.at
            for number, arrival in self._arrived.items()
            if arrival.adapter_id in self._trace.light
        )
        return {
            "tokens_per_s": round(self._tokens / self._seconds),
            "light_ttft_p50_ms": round(1e3 * statistics.median(waits), 1),
            "light_ttft_p99_ms": round(1e3 * waits[int(0.99 * len(waits))], 1),
            "jain": round(statistics.fmean(self._shares.jain), 3) if self._shares.jain else 1.0,
            "gap": round(max(self._shares.gaps, default=0.0)),
            "loads": self._tiers.loads,
            "copies": self._tiers.copies,
            "ranks_per_step": round(self._ranks_total / max(1, self._steps)),
        }
