"""A run from nothing to its report: servers, workers, load, faults, and the checker's verdict."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from chaos.answer_book import write_book
from chaos.checker import check
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
    with tempfile.TemporaryDirectory(prefix="loramux-chaos-") as folder:
        say(f"seed {options.seed}: asking PEFT for the answers of {options.adapters} adapters")
        book = write_book(Path(folder), options.adapters)
        say(f"starting {options.brokers} broker(s), an S3 server and {options.workers} workers")
        with scene_of(book, brokers=options.brokers, partitions=options.partitions, delivery=options.delivery) as scene:
            faults, skipped = choose_faults(options, scene, generator)
            for name, reason in skipped.items():
                say(f"left out: {name}: {reason}")
            asks = draw_asks(generator, book, options.requests, options.partitions, f"chaos-{options.seed}")
            load = Load(scene.kafka.bootstrap_servers, scene.topics["requests_topic"], asks, generator)
            scene.begin(load, options.workers)
            watch(scene)
            try:
                wounds = _torment(scene, faults, generator, options, say)
                _finish(scene, say)
                verdict = check(scene.kafka.bootstrap_servers, scene.topics, asks, book)
            except (ServerFailed, TimeoutError) as error:
                error.add_note(scene.logs())
                raise
    complaints = verdict.complaints(options.delivery) + load.failures
    if len(wounds) < options.faults:
        complaints.append(f"only {len(wounds)} of {options.faults} faults within {options.minutes_limit} minutes")
    return Report(asdict(options), wounds, skipped, verdict, time.monotonic() - begun, complaints)


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


def _finish(scene: Scene, say: Say) -> None:
    """Let the rest of the load through, and the workers leave in good order."""
    say(f"faults are over: {scene.load.left} requests left to send")
    scene.wait_until(lambda: scene.load.is_over, 300, "all requests are sent")
    scene.wait_until(lambda: scene.outstanding() == 0, 180, "all requests are answered")
    for worker in list(scene.workers):
        code = worker.server.stop()
        if code != 0:
            raise ServerFailed(worker.server.explain(f"ended with exit code {code} at the end"))
        scene.remove(worker)
    say("reading it all again")


def run_zombies(rounds: int, options: Options, say: Say) -> Report:
    """Only the zombie, `rounds` times: a worker with requests in its hands hangs, is replaced, and wakes up.

    Each round sends one burst to two workers and freezes one of them when a part of it is answered.
    """
    generator = random.Random(options.seed)
    begun = time.monotonic()
    burst = max(40, options.requests // rounds)
    wounds: list[Wound] = []
    with tempfile.TemporaryDirectory(prefix="loramux-chaos-") as folder:
        book = write_book(Path(folder), options.adapters)
        with scene_of(book, brokers=options.brokers, partitions=options.partitions, delivery=options.delivery) as scene:
            asks = draw_asks(generator, book, burst * rounds, options.partitions, f"zombie-{options.seed}")
            load = Load(scene.kafka.bootstrap_servers, scene.topics["requests_topic"], asks, generator)
            scene.begin(load, 2)
            try:
                for number in range(1, rounds + 1):
                    wound = _zombie_round(scene, burst, generator)
                    wounds.append(wound)
                    say(f"{number}/{rounds} {wound.detail}: {_outcome(wound)}")
                    scene.wait_until(scene.all_ready, 60, "the zombie is back in the group")
                _finish(scene, say)
                verdict = check(scene.kafka.bootstrap_servers, scene.topics, asks, book)
            except (ServerFailed, TimeoutError) as error:
                error.add_note(scene.logs())
                raise
    return Report(
        {**asdict(options), "requests": burst * rounds, "workers": 2, "faults": rounds, "kinds": [Zombie.name]},
        wounds,
        {},
        verdict,
        time.monotonic() - begun,
        verdict.complaints(options.delivery) + load.failures,
    )


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
