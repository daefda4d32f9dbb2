"""One fault after the other: in what order, when, and how long the system takes to recover from each.

**Time to recover** is counted from the moment a fault strikes (for an outage: begins) to the answer of the last
request that was sent before it or in the second after it; a burst over all partitions is sent in that second. After
that, and once all workers are ready again, comes the next fault, at a random moment; half of them wait for a burst of
the load to be in work.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from chaos.faults import KINDS, Fault
from chaos.load import Load
from chaos.scene import Scene

WINDOW = 1.0  # seconds after the fault in which requests count as hit by it
RECOVERY_SECONDS = 120.0  # at most
PAUSE = 2.0  # seconds between recovery and the next fault, at most
IN_THE_THICK = 12  # unanswered requests
TYPICAL_SECONDS = 12.0  # of one fault with its recovery, before any was measured
LAST_RATE = 150.0  # requests a second, when the faults are over


@dataclass(frozen=True, slots=True)
class Wound:
    """A fault that struck: how many requests were unanswered then, and seconds until the system had recovered."""

    kind: str
    detail: str
    in_flight: int
    seconds: float


def draw_faults(generator: random.Random, count: int, kinds: tuple[type[Fault], ...] = KINDS) -> list[Fault]:
    """`count` faults in random order, all kinds about equally often."""
    faults: list[Fault] = []
    while len(faults) < count:
        faults += [kind() for kind in generator.sample(kinds, len(kinds))]
    chosen = faults[:count]
    generator.shuffle(chosen)
    return chosen


class Pace:
    """Spreads the load over the faults: none of them strikes an idle system, and none is left without load."""

    def __init__(self, num_faults: int) -> None:
        self._num_faults = num_faults
        self._begun = time.monotonic()

    def set(self, load: Load, struck: int) -> None:
        """Allow the share of the next phase, `struck` faults being behind, at a rate that makes it last."""
        elapsed = time.monotonic() - self._begun
        each = (TYPICAL_SECONDS + elapsed) / (struck + 1)
        share = load.left if struck == self._num_faults else load.left // (self._num_faults - struck + 1)
        load.allowed = share
        load.rate = LAST_RATE if struck == self._num_faults else share / each


def strike(scene: Scene, fault: Fault, generator: random.Random) -> Wound:
    """Cause one fault and wait for the recovery. Raises TimeoutError when there is none."""
    in_flight, struck_at = scene.outstanding(), time.monotonic()
    scene.load.burst()
    detail = fault.strike(scene, generator)
    hit = struck_at + WINDOW
    time.sleep(max(0.0, hit - time.monotonic()))
    scene.wait_until(
        lambda: scene.outstanding(until=hit) == 0, RECOVERY_SECONDS, f"requests from before '{fault.name}' are answered"
    )
    return Wound(fault.name, detail, in_flight, scene.answered_by(hit) - struck_at)


def inflict(
    scene: Scene,
    faults: list[Fault],
    generator: random.Random,
    *,
    seconds_limit: float,
    on_wound: Callable[[Wound], None],
) -> list[Wound]:
    """All faults, one after the other, while the load goes on; fewer when `seconds_limit` is over."""
    pace = Pace(len(faults))
    limit = time.monotonic() + seconds_limit
    wounds: list[Wound] = []
    for fault in faults:
        if time.monotonic() > limit:
            break
        pace.set(scene.load, len(wounds))
        time.sleep(generator.uniform(0, PAUSE))
        if generator.random() < 0.5:
            scene.wait_until(
                lambda: scene.load.allowed <= 0 or scene.outstanding() >= IN_THE_THICK, 60, "a burst comes"
            )
        wound = strike(scene, fault, generator)
        wounds.append(wound)
        on_wound(wound)
        scene.wait_until(scene.all_ready, 120, f"all workers are ready after '{fault.name}'")
    pace.set(scene.load, len(faults))
    return wounds
