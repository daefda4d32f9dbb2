"""Reading topics as an application would: `read_committed`, from the beginning."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import orjson
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from chaos.quiet import quiet_options

END_SECONDS = 60.0


def open_consumer(servers: str, topic: str, *, isolation: str = "read_committed") -> Consumer:
    """A consumer at the beginning of every partition of a topic, in no group."""
    consumer = Consumer(
        {
            **quiet_options(servers),
            "group.id": "chaos-reader",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": isolation,
            "auto.offset.reset": "earliest",
        }
    )
    numbers = consumer.list_topics(topic, timeout=30).topics[topic].partitions
    consumer.assign([TopicPartition(topic, number, 0) for number in numbers])
    return consumer


def read_all(servers: str, topic: str, *, isolation: str = "read_committed") -> list[Message]:
    """Every message of a topic. Raises TimeoutError when its end does not come within END_SECONDS."""
    consumer = open_consumer(servers, topic, isolation=isolation)
    limit = time.monotonic() + END_SECONDS
    messages: list[Message] = []
    open_partitions = {each.partition for each in consumer.assignment()}
    try:
        while open_partitions:
            if time.monotonic() > limit:
                raise TimeoutError(f"no end of partitions {sorted(open_partitions)} of {topic}")
            for message in consumer.consume(500, timeout=0.5):
                error = message.error()
                if error is None:
                    messages.append(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    open_partitions.discard(message.partition())
        return messages
    finally:
        consumer.close()


@dataclass(frozen=True, slots=True)
class Seen:
    """When the first reply to a request was read (monotonic seconds), and whether it was an error."""

    at: float
    is_error: bool


class Watch:
    """Reads the replies while they come, in a thread: `seen` by request id. What counts is the checker's reading."""

    def __init__(self, servers: str, topic: str) -> None:
        self.seen: dict[str, Seen] = {}
        self.repeated = 0
        self.on_reply: Callable[[], None] = lambda: None
        self._consumer = open_consumer(servers, topic)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Read no more."""
        self._ending.set()
        self._thread.join()
        self._consumer.close()

    def _run(self) -> None:
        while not self._ending.is_set():
            for message in self._poll():
                self._take(message)

    def _poll(self) -> Iterator[Message]:
        try:
            yield from self._consumer.consume(500, timeout=0.02)
        except KafkaException:
            time.sleep(0.05)

    def _take(self, message: Message) -> None:
        value = message.value()
        if message.error() is not None or value is None:
            return
        reply = orjson.loads(value)
        if reply["request_id"] in self.seen:
            self.repeated += 1
        else:
            self.seen[reply["request_id"]] = Seen(time.monotonic(), reply["status"] != "ok")
            self.on_reply()
