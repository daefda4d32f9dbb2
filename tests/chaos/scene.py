"""What a run takes place on: Kafka, an S3 server with the adapters, workers, the load and a watch on the replies."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from chaos.answer_book import AnswerBook
from chaos.load import Load
from chaos.reading import Watch
from services.kafka import KafkaCluster
from services.process import ServerFailed, tail
from services.s3 import S3Server
from services.serving import new_topics
from services.worker import WorkerProcess

SESSION_TIMEOUT = 6.0  # seconds of silence after which a worker's partitions go to others
DISK_BYTES = 4 << 20  # of a worker's disk, where we may mount one
BUCKET = "adapters"
# The kernel gives the process a view of its own of what is mounted: nothing else on the machine changes.
OWN_DISK = f'mount -t tmpfs -o size={DISK_BYTES} loramux "$0" && exec "$@"'


class Worker(WorkerProcess):
    """A worker with a small disk of its own, where the system allows that."""

    def __init__(self, scene: Scene) -> None:
        self.disk = Path(tempfile.mkdtemp(prefix="disk-", dir=scene.folder.name))
        self.has_own_disk = scene.own_disks
        self.frozen: list[int] = []
        launcher = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", OWN_DISK, str(self.disk)]
        super().__init__(
            scene.kafka.bootstrap_servers,
            scene.book.model,
            wait=False,
            # what a killed worker leaves behind goes with the scene
            environment={**scene.s3.environment, "OMP_NUM_THREADS": "1", "TMPDIR": scene.folder.name},
            launcher=launcher if self.has_own_disk else (),
            disk_cache=self.disk,
            **scene.flags,
        )

    @property
    def disk_from_here(self) -> Path:
        """The folder of its disk tier, as this process can reach it."""
        return Path(f"/proc/{self.server.pid}/root{self.disk}") if self.has_own_disk else self.disk

    def freeze(self, *, engine: bool) -> None:
        """SIGSTOP the front, and the engine too if asked."""
        self.frozen = [self.server.pid, *(self.engine_pids() if engine else [])]
        for pid in self.frozen:
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT what was stopped."""
        for pid in self.frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.frozen = []

    def end(self) -> None:
        """End it in whatever state it is, and leave nothing."""
        self.thaw()
        if self.server.alive:
            self.server.kill()
        self.__exit__(None, None, None)


class Scene:
    """Everything of a run; `start_workers` and `load.start` set it going."""

    def __init__(self, kafka: KafkaCluster, s3: S3Server, book: AnswerBook, *, partitions: int, delivery: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="loramux-scene-")
        self.kafka = kafka
        self.s3 = s3
        self.book = book
        self.topics = new_topics(kafka, partitions)
        self.workers: list[Worker] = []
        self.own_disks = can_mount()
        self.watch = Watch(kafka.bootstrap_servers, self.topics["replies_topic"])
        self.load: Load
        adapter_bytes = sum(path.stat().st_size for path in (book.adapters / book.adapter_ids[0]).iterdir())
        self.flags: dict[str, object] = {
            **self.topics,
            "group_id": self.topics["requests_topic"],
            "delivery": delivery,
            "adapter_uri": f"s3://{BUCKET}/{{adapter_id}}",
            "dtype": "float32",
            "device": "cpu",
            "session_timeout": f"{SESSION_TIMEOUT}s",
            "drain_timeout": "20s",
            "revision_ttl": "3s",  # the store is asked again and again
            "disk_quota": adapter_bytes * len(book.adapter_ids) * 4 // 5,  # and adapters come and go
            "max_batch_sequences": 8,  # so that work waits inside a worker when it is hit
            "look_ahead": 64,
            "kv_cache_memory": "4MiB",
            "adapter_memory": "16MiB",
            "host_memory": "16MiB",
        }

    def begin(self, load: Load, workers: int) -> None:
        """Start the workers; returns when all have their share."""
        self.load = load
        for _ in range(workers):
            self.start_worker()
        self.wait_until(self.all_ready, 300, "workers are ready")

    def start_worker(self) -> Worker:
        """One more worker, which gets ready by itself."""
        worker = Worker(self)
        worker.__enter__()
        self.workers.append(worker)
        return worker

    def remove(self, worker: Worker) -> None:
        """Forget a worker that has ended, or end it."""
        self.workers.remove(worker)
        worker.end()

    def all_ready(self) -> bool:
        """Whether every worker has partitions and an engine. Raises ServerFailed for one that has died by itself."""
        for worker in self.workers:
            if not worker.server.alive:
                raise ServerFailed(worker.server.explain("died by itself"))
        return all(worker.is_ready() for worker in self.workers)

    def outstanding(self, until: float = float("inf")) -> int:
        """Requests that were sent before a moment and have no reply yet."""
        seen = self.watch.seen
        return sum(at <= until and request_id not in seen for request_id, at in list(self.load.sent.items()))

    def answered_by(self, until: float) -> float:
        """When the last reply to a request of before a moment was read; all have one."""
        seen = self.watch.seen
        return max((seen[i].at for i, at in list(self.load.sent.items()) if at <= until), default=until)

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Raises TimeoutError, saying what did not come about."""
        limit = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > limit:
                raise TimeoutError(f"after {seconds:.0f} s it is not so that {what}; {self._unanswered()}")
            time.sleep(0.02)

    def _unanswered(self) -> str:
        """How many requests, and some of them."""
        if not hasattr(self, "load"):
            return "nothing was sent"
        left = [f"{i} (partition {self.load.asks[i].partition})" for i in self.load.sent if i not in self.watch.seen]
        return f"{len(left)} unanswered: {', '.join(left[:5])}" if left else "all is answered"

    def logs(self) -> str:
        """The ends of all logs."""
        workers = [f"--- worker {worker.server.pid} ---\n{tail(worker.log_path, 15)}" for worker in self.workers]
        return "\n".join([*workers, self.kafka.recent_logs(), self.s3.recent_logs()])

    def close(self) -> None:
        """End what this scene started."""
        if hasattr(self, "load"):
            self.load.stop()
        for worker in list(self.workers):
            self.remove(worker)
        self.watch.close()
        self.folder.cleanup()


@contextlib.contextmanager
def scene_of(book: AnswerBook, *, brokers: int, partitions: int, delivery: str) -> Iterator[Scene]:
    """Servers with everything in place, until the end of the block."""
    with KafkaCluster(brokers) as kafka, S3Server() as s3:
        store = s3.store(s3.create_bucket(BUCKET))
        for path in sorted(book.adapters.rglob("*")):
            if path.is_file():
                store.put(str(path.relative_to(book.adapters)), path.read_bytes())
        scene = Scene(kafka, s3, book, partitions=partitions, delivery=delivery)
        try:
            yield scene
        finally:
            scene.close()


def can_mount() -> bool:
    """Whether a process of ours may have a disk of its own: Linux with user namespaces."""
    if shutil.which("unshare") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", OWN_DISK, folder, "true"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def random_victim(scene: Scene, generator: random.Random) -> Worker:
    """A worker that serves."""
    ready = [worker for worker in scene.workers if worker.is_ready()]
    return generator.choice(ready or scene.workers)
