"""What is done to a running system: each fault a class, `strike` does it and returns when its cause is over.

Whether the system has recovered is not looked at here: see `schedule`.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from chaos.scene import SESSION_TIMEOUT, Scene, Worker, random_victim
from services.process import ServerFailed

DRAIN_SECONDS = 40.0


class Fault(ABC):
    """One kind of fault. `strike` returns a word or two about what it did."""

    name: ClassVar[str]

    @abstractmethod
    def strike(self, scene: Scene, generator: random.Random) -> str:
        """Do it, and undo what can be undone."""

    def impossible(self, scene: Scene) -> str | None:
        """Why this fault cannot be caused here, if it cannot."""
        return None


class KillWorker(Fault):
    """kill -9 to the front of a worker (its engine follows); another worker is started at once."""

    name = "kill -9 worker"

    def strike(self, scene: Scene, generator: random.Random) -> str:
        victim = random_victim(scene, generator)
        victim.server.kill()
        scene.remove(victim)
        scene.start_worker()
        return "replaced"


class KillEngine(Fault):
    """kill -9 to the engine process of a worker, which starts another."""

    name = "kill -9 engine"

    def strike(self, scene: Scene, generator: random.Random) -> str:
        for pid in random_victim(scene, generator).engine_pids():
            os.kill(pid, signal.SIGKILL)
        return ""


class StopWorker(Fault):
    """SIGTERM to a worker, which must drain and end with exit code 0; another one is started meanwhile."""

    name = "SIGTERM worker"

    def strike(self, scene: Scene, generator: random.Random) -> str:
        victim = random_victim(scene, generator)
        scene.start_worker()
        return leave(scene, victim)


class StopBroker(Fault):
    """A broker ends in good order, stays away for some seconds, and comes back."""

    name = "restart broker"

    def strike(self, scene: Scene, generator: random.Random) -> str:
        return away(scene, generator, scene.kafka.stop_broker)


class KillBroker(Fault):
    """A broker is killed, stays away for some seconds, and comes back."""

    name = "kill -9 broker"

    def strike(self, scene: Scene, generator: random.Random) -> str:
        return away(scene, generator, scene.kafka.kill_broker)


class Zombie(Fault):
    """A worker hangs (SIGSTOP) until others have taken its partitions and answered, then goes on where it was."""

    name = "zombie"

    def strike(self, scene: Scene, generator: random.Random) -> str:
        victim = random_victim(scene, generator)
        stopped = time.monotonic()
        with_engine = generator.random() < 0.5
        victim.freeze(engine=with_engine)
        try:
            time.sleep(SESSION_TIMEOUT)
            scene.wait_until(lambda: scene.outstanding(until=stopped) == 0, 60, "others answer for the zombie")
        finally:
            victim.thaw()
        return "with its engine" if with_engine else "its engine went on"


class S3Down(Fault):
    """The object storage is gone for some seconds."""

    name = "S3 down"

    def strike(self, scene: Scene, generator: random.Random) -> str:
        scene.s3.stop()
        time.sleep(generator.uniform(3, 6))
        scene.s3.start()
        return ""


class S3Silent(Fault):
    """The object storage takes connections and says nothing for some seconds."""

    name = "S3 hangs"

    def strike(self, scene: Scene, generator: random.Random) -> str:
        scene.s3.freeze()
        try:
            time.sleep(generator.uniform(3, 6))
        finally:
            scene.s3.thaw()
        return ""


class DiskFull(Fault):
    """Something else fills the disk of a worker's disk tier, for some seconds."""

    name = "disk full"

    def strike(self, scene: Scene, generator: random.Random) -> str:
        victim = random_victim(scene, generator)
        filler = victim.disk_from_here / "filler"
        written = 0
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    written += file.write(bytes(4096))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        try:
            time.sleep(generator.uniform(3, 6))
        finally:
            filler.unlink()
        return f"{written >> 10} KiB"

    def impossible(self, scene: Scene) -> str | None:
        return None if scene.own_disks else "a worker cannot be given a small disk of its own (unshare and mount)"


class ScaleOut(Fault):
    """One more worker for some seconds, then it leaves in good order."""

    name = "scale out and back"

    def strike(self, scene: Scene, generator: random.Random) -> str:
        newcomer = scene.start_worker()
        scene.wait_until(newcomer.is_ready, 90, "the new worker is ready")
        time.sleep(generator.uniform(1, 3))
        return leave(scene, newcomer)


def away(scene: Scene, generator: random.Random, end: Callable[[int], None]) -> str:
    """Some broker ends, stays away for some seconds, and comes back."""
    number = generator.randrange(len(scene.kafka.ports))
    end(number)
    time.sleep(generator.uniform(0, 3))
    scene.kafka.start_broker(number)
    return f"broker {number}"


def leave(scene: Scene, worker: Worker) -> str:
    """SIGTERM; raises ServerFailed unless the worker ends in time and with exit code 0."""
    begun = time.monotonic()
    worker.server.signal(signal.SIGTERM)
    code = worker.server.wait(DRAIN_SECONDS)
    if code != 0:
        raise ServerFailed(worker.server.explain(f"ended with exit code {code} after SIGTERM"))
    scene.remove(worker)
    return f"drained in {time.monotonic() - begun:.1f} s"


KINDS: tuple[type[Fault], ...] = (
    KillWorker,
    KillEngine,
    StopWorker,
    StopBroker,
    KillBroker,
    Zombie,
    S3Down,
    S3Silent,
    DiskFull,
    ScaleOut,
)
