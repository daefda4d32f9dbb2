"""Who asks for what, when: the load patterns that policies are compared on."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

RANKS = (8, 16, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request; `at` in seconds."""

    at: float
    adapter_id: str
    prompt: int
    new: int


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival; `light` are the tenants whose waiting is looked at."""

    name: str
    about: str
    arrivals: tuple[Arrival, ...]
    light: frozenset[str]
    cold: frozenset[str] = frozenset()  # not in the host tier at the start
    pool_share: float = 1.0  # how much of the usual gpu pool there is

    def ranks(self) -> dict[str, int]:
        """The rank of each adapter."""
        names = sorted({arrival.adapter_id for arrival in self.arrivals})
        draw = random.Random(0)
        return {name: draw.choice(RANKS) for name in names}


def _request(draw: random.Random, at: float, adapter_id: str) -> Arrival:
    """Prompts of 20 to 1,000 tokens, half of them above 120; 4 to 400 new tokens, half of them above 60."""
    prompt = min(1000, max(20, round(draw.lognormvariate(math.log(120), 0.7))))
    new = min(400, max(4, round(draw.lognormvariate(math.log(60), 0.7))))
    return Arrival(at, adapter_id, prompt, new)


def _poisson(draw: random.Random, adapter_id: str, seconds: float, rate: Callable[[float], float]) -> Iterator[Arrival]:
    """Arrivals at `rate(time)` a second, by thinning a process of the highest rate."""
    most = max(rate(seconds * i / 200) for i in range(201))
    at = draw.expovariate(most)
    while at < seconds:
        if draw.random() * most < rate(at):
            yield _request(draw, at, adapter_id)
        at += draw.expovariate(most)


def _light(draw: random.Random, seconds: float, num: int = 20, rate: float = 1.0) -> list[Arrival]:
    return [a for i in range(num) for a in _poisson(draw, f"light-{i}", seconds, lambda _: rate)]


def _names(arrivals: list[Arrival], start: str = "light") -> frozenset[str]:
    return frozenset(a.adapter_id for a in arrivals if a.adapter_id.startswith(start))


def quiet(draw: random.Random, seconds: float) -> Trace:
    """The light tenants of the next trace alone, for comparison."""
    light = _light(draw, seconds)
    return _trace("quiet", "20 adapters send 1/s", light, _names(light))


def flood(draw: random.Random, seconds: float) -> Trace:
    """One adapter sends at once what takes the whole time, 20 send one request a second each."""
    light = _light(draw, seconds)
    heavy = [_request(draw, 0.0, "flood") for _ in range(round(170 * seconds))]
    return _trace("flood", "one adapter floods, 20 send 1/s", [*heavy, *light], _names(light))


def bursts(draw: random.Random, seconds: float) -> Trace:
    """Twelve adapters that send 60 a second for a third of the time, each at another time, beside 20 light ones."""
    light = _light(draw, seconds)

    def on_off(phase: float) -> Callable[[float], float]:
        return lambda at: 60.0 if (at / 6 + phase) % 1.0 < 1 / 3 else 0.0

    heavy = [a for i in range(12) for a in _poisson(draw, f"burst-{i}", seconds, on_off(draw.random()))]
    return _trace("bursts", "12 adapters send 60/s on and off, 20 send 1/s", [*heavy, *light], _names(light))


def zipf(draw: random.Random, seconds: float) -> Trace:
    """300 adapters by Zipf(1), a tenth more than the engine does; the 200 that ask least are the light ones."""
    weights = [1 / (i + 1) for i in range(300)]
    arrivals = []
    at = draw.expovariate(170)
    while at < seconds:
        number = draw.choices(range(300), weights)[0]
        arrivals.append(_request(draw, at, f"{'zipf' if number < 100 else 'light'}-{number}"))
        at += draw.expovariate(170)
    return _trace("zipf", "300 adapters, Zipf(1), 170/s", arrivals, _names(arrivals))


def tight(draw: random.Random, seconds: float) -> Trace:
    """The same over a pool for half as many: most of what waits finds no room."""
    return replace(zipf(draw, seconds), name="tight", about="the same, gpu pool of half the size", pool_share=0.5)


def diurnal(draw: random.Random, seconds: float) -> Trace:
    """A day in so many seconds: 60 adapters of three regions, eight hours apart, whose nights are quiet; 20 light."""
    light = _light(draw, seconds)

    def daily(region: int) -> Callable[[float], float]:
        return lambda at: 9.0 * max(0.0, math.sin(2 * math.pi * (at / seconds - region / 3))) ** 2

    heavy = [a for i in range(60) for a in _poisson(draw, f"region{i % 3}-{i}", seconds, daily(i % 3))]
    return _trace("diurnal", "60 adapters in 3 time zones, 20 send 1/s", [*heavy, *light], _names(light))


def cold(draw: random.Random, seconds: float) -> Trace:
    """Ten adapters that keep the engine busy, and 8 a second that are named for the first time, and only once."""
    heavy = [a for i in range(10) for a in _poisson(draw, f"warm-{i}", seconds, lambda _: 15.0)]
    rare = [_request(draw, draw.uniform(0, seconds), f"light-{i}") for i in range(round(8 * seconds))]
    return _trace("cold", "10 busy adapters, 8 new ones a second", [*heavy, *rare], _names(rare), _names(rare))


def _trace(
    name: str, about: str, arrivals: list[Arrival], light: frozenset[str], cold: frozenset[str] = frozenset()
) -> Trace:
    return Trace(name, about, tuple(sorted(arrivals, key=lambda a: a.at)), light, cold)


TRACES: dict[str, Callable[[random.Random, float], Trace]] = {
    maker.__name__: maker for maker in (quiet, flood, bursts, zipf, tight, diurnal, cold)
}
