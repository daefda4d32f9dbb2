"""A run from nothing to its report: servers, workers, load, faults, and the checker's verdict."""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from chaos.answer_book import write_book
from chaos.checker import Verdict, check
from chaos.faults import KINDS, Fault, Zombie
from chaos.load import Load, draw_asks
from chaos.report import Report
from chaos.scene import Scene, scene_of
from chaos.schedule import Wound, draw_faults, inflict
from services.process import ServerFailed

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What a run is asked for."""

    requests: int = 10_000
    partitions: int = 12
    workers: int = 3
    faults: int = 20
    brokers: int = 1
    adapters: int = 50
    seed: int = 1
    delivery: str = "exactly_once"
    minutes_limit: float = 8.0
    kinds: tuple[str, ...] = ()


def run(options: Options, say: Say, watch: Callable[[Scene], None] = lambda scene: None) -> Report:
    """Do it all. `say` is told what happens, `watch` gets the scene when the load begins.

    Raises ServerFailed and TimeoutError, the logs of all servers in their notes, when the system does not recover.
    """
    generator = random.Random(options.seed)
    begun = time.monotonic()
    with _stage(options, say) as scene:
        faults, skipped = choose_faults(options, scene, generator)
        for name, reason in skipped.items():
            say(f"left out: {name}: {reason}")
        load = _load(scene, generator, options.requests, options, "chaos")
        scene.begin(load, options.workers)
        watch(scene)
        wounds = _torment(scene, faults, generator, options, say)
        verdict = _judge(scene, say)
    complaints = verdict.complaints(options.delivery) + load.failures
    if len(wounds) < options.faults:
        complaints.append(f"only {len(wounds)} of {options.faults} faults within {options.minutes_limit} minutes")
    return Report(asdict(options), wounds, skipped, verdict, time.monotonic() - begun, complaints)


def run_zombies(rounds: int, options: Options, say: Say) -> Report:
    """Only the zombie, `rounds` times: a worker with requests in its hands hangs, is replaced, and wakes up.

    Each round sends one burst to two workers and freezes one of them when a part of it is answered.
    """
    generator = random.Random(options.seed)
    begun = time.monotonic()
    burst = max(40, options.requests // rounds)
    settings = {**asdict(options), "requests": burst * rounds, "workers": 2, "faults": rounds, "kinds": [Zombie.name]}
    wounds: list[Wound] = []
    with _stage(options, say) as scene:
        load = _load(scene, generator, burst * rounds, options, "zombie")
        scene.begin(load, 2)
        for number in range(1, rounds + 1):
            wound = _zombie_round(scene, burst, generator)
            wounds.append(wound)
            say(f"{number}/{rounds} {wound.detail}: {_outcome(wound)}")
            scene.wait_until(scene.all_ready, 120, "the zombie is back in the group")
        verdict = _judge(scene, say)
    complaints = verdict.complaints(options.delivery) + load.failures
    return Report(settings, wounds, {}, verdict, time.monotonic() - begun, complaints)


@contextlib.contextmanager
def _stage(options: Options, say: Say) -> Iterator[Scene]:
    """The scene; what goes wrong on it gets the logs as a note."""
    with tempfile.TemporaryDirectory(prefix="loramux-chaos-") as folder:
        say(f"seed {options.seed}: asking PEFT for the answers of {options.adapters} adapters")
        book = write_book(Path(folder), options.adapters)
        say(f"starting {options.brokers} broker(s), an S3 server and workers")
        with scene_of(book, brokers=options.brokers, partitions=options.partitions, delivery=options.delivery) as scene:
            try:
                yield scene
            except (ServerFailed, TimeoutError) as error:
                error.add_note(scene.logs())
                raise


def _load(scene: Scene, generator: random.Random, count: int, options: Options, name: str) -> Load:
    asks = draw_asks(generator, scene.book, count, options.partitions, f"{name}-{options.seed}")
    return Load(scene.kafka.bootstrap_servers, scene.topics["requests_topic"], asks, generator)


def choose_faults(options: Options, scene: Scene, generator: random.Random) -> tuple[list[Fault], dict[str, str]]:
    """The faults in their order, and those kinds that are impossible here, with the reason."""
    kinds = tuple(kind for kind in KINDS if not options.kinds or kind.name in options.kinds)
    reasons = {kind.name: kind().impossible(scene) for kind in kinds}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    possible = tuple(kind for kind in kinds if kind.name not in skipped)
    return draw_faults(generator, options.faults, possible), skipped


def _torment(scene: Scene, faults: list[Fault], generator: random.Random, options: Options, say: Say) -> list[Wound]:
    count = 0

    def tell(wound: Wound) -> None:
        nonlocal count
        count += 1
        detail = f" ({wound.detail})" if wound.detail else ""
        say(f"{count}/{len(faults)} {wound.kind}{detail}: {_outcome(wound)}")

    scene.load.start()
    return inflict(scene, faults, generator, seconds_limit=options.minutes_limit * 60, on_wound=tell)


def _outcome(wound: Wound) -> str:
    return f"{wound.in_flight} unanswered, recovered in {wound.seconds:.1f} s"


def _judge(scene: Scene, say: Say) -> Verdict:
    """Let the rest of the load through and the workers leave in good order; then read everything."""
    say(f"faults are over: {scene.load.left} requests left to send")
    scene.wait_until(lambda: scene.load.is_over, 300, "all requests are sent")
    try:
        scene.wait_until(lambda: scene.outstanding() == 0, 180, "all requests are answered")
    except TimeoutError as error:
        say(str(error))  # the checker will count what is lost
    for worker in list(scene.workers):
        code = worker.server.stop(60)
        if code != 0:
            raise ServerFailed(worker.server.explain(f"ended with exit code {code} at the end"))
        scene.remove(worker)
    say("reading it all again")
    return check(scene.kafka.bootstrap_servers, scene.topics, scene.load.asks.values(), scene.book)


def _zombie_round(scene: Scene, burst: int, generator: random.Random) -> Wound:
    before = len(scene.watch.seen)
    scene.load.send(burst)
    some = before + generator.randint(1, burst // 3)

    def some_answered() -> bool:
        scene.load.poll()
        return len(scene.watch.seen) >= some

    scene.wait_until(some_answered, 60, "a part of the burst is answered")
    stopped = time.monotonic()
    in_flight = scene.outstanding()
    detail = Zombie().strike(scene, generator)
    answered = scene.answered_by(stopped)
    # what a zombie still has in its hands it sends now
    time.sleep(1.0)
    return Wound(Zombie.name, detail, in_flight, answered - stopped)
