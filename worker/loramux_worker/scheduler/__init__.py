"""Which sequences run in a step: fair queuing per adapter under bounds of tokens, sequences, ranks and KV blocks."""

from __future__ import annotations

from loramux_worker.scheduler.config import SchedulerConfig
from loramux_worker.scheduler.fair_queue import FairQueue
from loramux_worker.scheduler.policy import AdapterPolicy, Policies
from loramux_worker.scheduler.scheduler import Scheduler
from loramux_worker.scheduler.step import Chunk, Step
from loramux_worker.scheduler.tiers import AdapterKey, AdapterTiers, Demand

__all__ = [
    "AdapterKey",
    "AdapterPolicy",
    "AdapterTiers",
    "Chunk",
    "Demand",
    "FairQueue",
    "Policies",
    "Scheduler",
    "SchedulerConfig",
    "Step",
]
