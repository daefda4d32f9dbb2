"""Apache Kafka on loopback for the tests; `python -m services.kafka` (in tests/) runs one for a person.

    with KafkaCluster(brokers=3) as kafka:
        kafka.create_topic("lora.requests", partitions=12)
        … AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers) …
        kafka.kill_broker(1)

Every broker is also a controller (KRaft). Data and logs lie in a temporary folder that goes with the cluster.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import logging
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

from services.install import kafka_classes, kafka_libs
from services.kafka_security import LISTENERS, WireSecurity
from services.process import ServerFailed, ServerProcess, free_port, tail

JVM = ["-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Djava.awt.headless=true"]
START_SECONDS = 60.0

LOG4J = """\
rootLogger.level = info
rootLogger.appenderRef.stdout.ref = stdout
appender.stdout.type = Console
appender.stdout.name = stdout
appender.stdout.layout.type = PatternLayout
appender.stdout.layout.pattern = %d{HH:mm:ss.SSS} %p %m (%c{1})%n
"""

# A broker for tests: quick to start, small in memory, quick to notice that a client or a broker has died.
PROPERTIES = {
    "process.roles": "broker,controller",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "auto.create.topics.enable": "false",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.num.partitions": "1",
    "broker.heartbeat.interval.ms": "500",
    "broker.session.timeout.ms": "3000",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
    "num.network.threads": "2",
    "num.io.threads": "4",
    "background.threads": "2",
    "log.cleaner.dedupe.buffer.size": "8388608",
}


class KafkaCluster:
    """One or more Kafka brokers, numbered from 0, from `with` to the end of its block.

    `bootstrap_servers` is the address for clients. Calls block until what they ask for has happened: where an
    event loop must go on meanwhile, run them through `asyncio.to_thread`. Raises ServiceMissing when Kafka is
    not installed, ServerFailed (with the broker's log) when it does not start.

    `security` adds listeners with TLS and SASL (`servers("SASL_SSL")`); the plain one stays, for the rest.
    `java` are further options of the Java that runs the brokers.
    """

    def __init__(
        self,
        brokers: int = 1,
        *,
        port: int | None = None,
        security: WireSecurity | None = None,
        java: Sequence[str] = (),
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="loramux-kafka-"))
        self.ports = [port if port is not None and i == 0 else free_port() for i in range(brokers)]
        self._controller_ports = [free_port() for _ in range(brokers)]
        self._directory_ids = [random_id() for _ in range(brokers)]
        self._brokers: dict[int, ServerProcess] = {}
        self.security = security
        self._java_options = java
        names = LISTENERS if security is not None else ()
        self._secure_ports = {name: [free_port() for _ in range(brokers)] for name in names}

    @property
    def bootstrap_servers(self) -> str:
        """`host:port` of every broker, joined by commas."""
        return ",".join(f"127.0.0.1:{port}" for port in self.ports)

    def servers(self, listener: str) -> str:
        """`bootstrap_servers` of a listener of `security`: SASL_SSL or SSL."""
        return ",".join(f"127.0.0.1:{port}" for port in self._secure_ports[listener])

    @property
    def log_paths(self) -> list[Path]:
        """The log file of each broker."""
        return [self.folder / f"broker-{i}.log" for i in range(len(self.ports))]

    def __enter__(self) -> KafkaCluster:
        try:
            self._format()
            for i in range(len(self.ports)):
                self._launch(i)
            for i in range(len(self.ports)):
                self._wait_ready(i)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(self.recent_logs())
        self._end()

    def create_topic(
        self,
        name: str,
        partitions: int = 1,
        *,
        replication: int | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        """Creates a topic and waits until every partition has a leader; 3 replicas if 3 brokers."""
        replicas = replication or min(3, len(self.ports))
        topic = NewTopic(name, num_partitions=partitions, replication_factor=replicas, config=dict(config or {}))
        admin = self.admin()
        admin.create_topics([topic], operation_timeout=START_SECONDS)[name].result(START_SECONDS)
        limit = time.monotonic() + START_SECONDS
        while len(leaders(admin, name)) < partitions:
            if time.monotonic() > limit:
                raise ServerFailed(
                    f"{name} has no leader for each of its {partitions} partitions\n{self.recent_logs()}"
                )
            time.sleep(0.02)

    def delete_topic(self, name: str) -> None:
        """Deletes a topic."""
        admin = self.admin()  # a client that nobody holds on to takes its answers with it
        admin.delete_topics([name], operation_timeout=START_SECONDS)[name].result(START_SECONDS)

    def admin(self) -> AdminClient:
        """A new administration client of the cluster, for what has no method here."""
        return admin_client(self.bootstrap_servers)

    def stop_broker(self, i: int, seconds: float = 30.0) -> int:
        """Ends broker `i` in good order (SIGTERM), at once where that takes longer than `seconds`; the exit code."""
        return self._brokers.pop(i).stop(seconds)

    def kill_broker(self, i: int) -> None:
        """Ends broker `i` at once (SIGKILL)."""
        self._brokers.pop(i).kill()

    def start_broker(self, i: int) -> None:
        """Starts broker `i` again on the port and the data that it had, and waits until it serves."""
        self._launch(i)
        self._wait_ready(i)

    def recent_logs(self) -> str:
        """The last lines of every broker's log."""
        return "\n".join(f"--- {path.name} ---\n{tail(path)}" for path in self.log_paths)

    def _format(self) -> None:
        (self.folder / "log4j2.properties").write_text(LOG4J)
        if len(self.ports) == 1:
            voters = ["--standalone"]
        else:
            addresses = zip(self._controller_ports, self._directory_ids, strict=True)
            listed = ",".join(f"{i}@127.0.0.1:{port}:{known_as}" for i, (port, known_as) in enumerate(addresses))
            voters = ["--initial-controllers", listed]
        cluster_id = random_id()
        formatting = []
        for i in range(len(self.ports)):
            self._properties_path(i).write_text(self._properties(i))
            command: list[str | Path] = ["format", "-t", cluster_id, "-c", self._properties_path(i), *voters]
            command += self.security.scram_arguments if self.security is not None else []
            formatting.append(self._java(i, "kafka.tools.StorageTool", command))
        for process in formatting:
            if process.wait(START_SECONDS) != 0:
                raise ServerFailed(process.explain("could not format its storage"))

    def _launch(self, i: int) -> None:
        if i in self._brokers:
            raise ServerFailed(f"broker {i} runs already")
        self._brokers[i] = self._java(i, "kafka.Kafka", [self._properties_path(i)], self._java_options)

    def _java(self, i: int, main_class: str, arguments: list[str | Path], options: Sequence[str] = ()) -> ServerProcess:
        options = [*JVM, f"-Dlog4j2.configurationFile={self.folder / 'log4j2.properties'}", *options]
        if (classes := kafka_classes()).is_file():
            options.append(f"-XX:SharedArchiveFile={classes}")
        command = ["java", *options, "-cp", f"{kafka_libs()}/*", main_class, *arguments]
        return ServerProcess(command, log_path=self.log_paths[i])

    def _wait_ready(self, i: int) -> None:
        # Asking the broker itself: it lists itself only once the controllers have taken it in.
        admin = admin_client(f"127.0.0.1:{self.ports[i]}")
        self._brokers[i].wait_until(lambda: i in known_brokers(admin), seconds=START_SECONDS)

    def _properties_path(self, i: int) -> Path:
        return self.folder / f"broker-{i}.properties"

    def _properties(self, i: int) -> str:
        replicas = min(3, len(self.ports))
        ports = {"PLAINTEXT": self.ports, "CONTROLLER": self._controller_ports, **self._secure_ports}
        listeners = ",".join(f"{name}://127.0.0.1:{of_broker[i]}" for name, of_broker in ports.items())
        protocols = {name: "PLAINTEXT" if name == "CONTROLLER" else name for name in ports}
        own: dict[str, object] = {
            "listener.security.protocol.map": ",".join(f"{name}:{kind}" for name, kind in protocols.items()),
            **(self.security.broker_properties if self.security is not None else {}),
            "node.id": i,
            "listeners": listeners,
            "advertised.listeners": listeners,
            "controller.quorum.bootstrap.servers": ",".join(f"127.0.0.1:{p}" for p in self._controller_ports),
            "log.dirs": self.folder / f"data-{i}",
            "default.replication.factor": replicas,
            "min.insync.replicas": max(1, replicas - 1),
        }
        for topic in ("offsets.topic", "transaction.state.log", "share.coordinator.state.topic"):
            own[f"{topic}.replication.factor"] = replicas
        for topic in ("transaction.state.log", "share.coordinator.state.topic"):
            own[f"{topic}.min.isr"] = max(1, replicas - 1)
        return "".join(f"{key}={value}\n" for key, value in {**PROPERTIES, **own}.items())

    def _end(self) -> None:
        # The data goes too, so there is nothing that a slower good-bye would save.
        for broker in self._brokers.values():
            broker.kill()
        self._brokers.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def random_id() -> str:
    """A Kafka uuid: 22 characters of URL-safe base64, no dash at its head (it would look like a flag)."""
    while True:
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if not text.startswith("-"):
            return text


def admin_client(bootstrap_servers: str) -> AdminClient:
    """An administration client that keeps silent about brokers that are down."""
    quiet = logging.getLogger("services.kafka.client")
    quiet.setLevel(logging.CRITICAL)
    return AdminClient(
        {
            "bootstrap.servers": bootstrap_servers,
            "reconnect.backoff.max.ms": 200,
            "log_level": 0,
            "logger": quiet,
        }
    )


def known_brokers(admin: AdminClient) -> set[int]:
    """Numbers of the brokers that the cluster's metadata lists; none while nobody answers."""
    with contextlib.suppress(KafkaException):
        return set(admin.list_topics(timeout=1.0).brokers)
    return set()


def leaders(admin: AdminClient, topic: str) -> dict[int, int]:
    """Partition → number of its leader, of the partitions that have one."""
    with contextlib.suppress(KafkaException):
        partitions = admin.list_topics(topic, timeout=5.0).topics[topic].partitions
        return {number: partition.leader for number, partition in partitions.items() if partition.leader >= 0}
    return {}


def main() -> None:
    """Runs one broker with loramux's topics until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Apache Kafka on loopback, until Ctrl-C; its data goes with it")
    parser.add_argument("--port", type=int, default=9092)
    parser.add_argument("--partitions", type=int, default=8, help="of each of loramux's topics")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    print("kafka: starting …", flush=True)
    with contextlib.suppress(KeyboardInterrupt), KafkaCluster(port=arguments.port) as kafka:
        for topic in ("lora.requests", "lora.replies", "lora.stream", "lora.dead-letters", "lora.control"):
            kafka.create_topic(topic, arguments.partitions)
            print(f"kafka: topic {topic}, {arguments.partitions} partitions", flush=True)
        print(
            f"kafka: broker on {kafka.bootstrap_servers}, log in {kafka.log_paths[0]}; Ctrl-C ends it",
            flush=True,
        )
        signal.pause()
    print("kafka: ended", flush=True)


if __name__ == "__main__":
    main()
