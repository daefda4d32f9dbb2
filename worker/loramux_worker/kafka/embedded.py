"""A Kafka broker inside this process, for the demo and for development: librdkafka's mock cluster.

It speaks the real protocol to any client on this machine and needs nothing but the confluent-kafka wheel.
Its limits:

- at-least-once only: transactions are acknowledged but not done, `read_committed` hides nothing;
- topics come into being when first asked for, always with 4 partitions;
- a partition keeps its last 5 MiB: older messages vanish, read or not, and all of them with the process;
- one member a consumer group: a second aiokafka member does not get in while the first one stays.

Every delivery promise of loramux is tested on Apache Kafka instead.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from types import TracebackType
from typing import TYPE_CHECKING

from loramux_worker.errors import ConfigurationError

if TYPE_CHECKING:
    from confluent_kafka import Producer

START_SECONDS = 10.0


class EmbeddedBroker:
    """One broker on loopback from `with` to the end of its block.

        with EmbeddedBroker() as broker:
            … AIOKafkaProducer(bootstrap_servers=broker.bootstrap_servers) …

    `port` 0 takes a free one. Raises ConfigurationError when confluent-kafka is not installed or the port is
    taken.
    """

    def __init__(self, port: int = 0) -> None:
        self._asked_port = port
        self._cluster: Producer | None = None
        self._entrance: Entrance | None = None
        self._address = ("127.0.0.1", 0)

    @property
    def bootstrap_servers(self) -> str:
        """`host:port` for clients, from entering the block on."""
        host, port = self._address
        return f"{host}:{port}"

    def __enter__(self) -> EmbeddedBroker:
        self._cluster = start_mock_cluster()
        # The one broker that this client, told of no other, can know is the mock itself.
        (broker,) = self._cluster.list_topics(timeout=START_SECONDS).brokers.values()
        self._address = (broker.host, broker.port)
        if self._asked_port:
            self._entrance = Entrance(self._asked_port, self._address)
            self._address = ("127.0.0.1", self._asked_port)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._entrance is not None:
            self._entrance.close()
        self._cluster = None  # the mock cluster lives as long as the client that it was configured on


def start_mock_cluster() -> Producer:
    """A client with a mock cluster of one broker behind it. Raises ConfigurationError."""
    try:
        from confluent_kafka import Producer
    except ImportError:
        raise ConfigurationError("the embedded broker needs confluent-kafka: pip install 'loramux[embedded]'") from None
    silent = logging.getLogger(f"{__name__}.librdkafka")
    silent.setLevel(logging.CRITICAL)  # it warns about its own test settings
    return Producer({"test.mock.num.brokers": 1, "log_level": 0, "logger": silent})


class Entrance:
    """Lets clients in at a port of our choice: the mock cluster picks its own.

    It forwards TCP connections to `target`. Clients learn the true address from the metadata that they ask
    for first, and go there for the rest. Raises ConfigurationError when the port is taken.
    """

    def __init__(self, port: int, target: tuple[str, int]) -> None:
        try:
            self._socket = socket.create_server(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise ConfigurationError(f"--port {port}: {error}; choose another") from None
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._closed = asyncio.Event()
        self._forwarding: dict[asyncio.Task[None], socket.socket] = {}
        self._thread = threading.Thread(target=self._run, name="embedded-broker-entrance", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends every connection and frees the port."""
        self._loop.call_soon_threadsafe(self._closed.set)
        self._thread.join()

    def _run(self) -> None:
        with self._socket, asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())  # the runner ends what is still being forwarded

    async def _serve(self) -> None:
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket, self._accept)
        await self._closed.wait()
        self._loop.remove_reader(self._socket)

    def _accept(self) -> None:
        try:
            client, _ = self._socket.accept()
        except OSError:
            return  # it left before we came to the door
        task = self._loop.create_task(forward(client, self._target))
        self._forwarding[task] = client
        # Not in `forward`: a task that is ended before its first step runs none of its code.
        task.add_done_callback(lambda ended: self._forwarding.pop(ended).close())


async def forward(client: socket.socket, target: tuple[str, int]) -> None:
    """Connects to `target` and copies bytes both ways until both sides have ended or one has failed."""
    client.setblocking(False)
    with socket.socket() as onward:
        onward.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(onward, target)
            async with asyncio.TaskGroup() as directions:
                directions.create_task(copy(client, onward))
                directions.create_task(copy(onward, client))
        except* OSError:
            pass  # a client or the cluster went away: it is theirs to try again


async def copy(source: socket.socket, sink: socket.socket) -> None:
    """Copies bytes from a non-blocking socket to another until the end of the stream."""
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, 64 * 1024):
        await loop.sock_sendall(sink, data)
    sink.shutdown(socket.SHUT_WR)
