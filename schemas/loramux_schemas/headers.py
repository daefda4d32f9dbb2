"""Record headers: which we read, where a reply goes, and what a dead letter carries.

Two dialects are spoken: our own (`correlation_id`, `reply_to`) and Spring for Apache Kafka's
(`kafka_correlationId`, `kafka_replyTopic`, `kafka_replyPartition`; numbers are big-endian there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from loramux_schemas.errors import printable
from loramux_schemas.topics import is_topic_name

CORRELATION_ID: Final = "correlation_id"
REPLY_TO: Final = "reply_to"
TRACEPARENT: Final = "traceparent"
TENANT: Final = "tenant"  # unless the worker's --tenant-header says another

SPRING_CORRELATION_ID: Final = "kafka_correlationId"
SPRING_REPLY_TOPIC: Final = "kafka_replyTopic"
SPRING_REPLY_PARTITION: Final = "kafka_replyPartition"

DEAD_LETTER_TOPIC: Final = "kafka_dlt-original-topic"
DEAD_LETTER_PARTITION: Final = "kafka_dlt-original-partition"
DEAD_LETTER_OFFSET: Final = "kafka_dlt-original-offset"
DEAD_LETTER_MESSAGE: Final = "kafka_dlt-exception-message"

CORRELATION_HEADERS: Final = (CORRELATION_ID, SPRING_CORRELATION_ID)
ECHOED_HEADERS: Final = (*CORRELATION_HEADERS, TRACEPARENT)

MAX_REASON_CHARS: Final = 1024
# Names and values together. They go with the reply and with every delta, so a long one would be sent again and again.
MAX_ECHOED_BYTES: Final = 16 * 1024

Headers = Sequence[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class ReplyRoute:
    """Where the answer to one record goes and the headers that go with it.

    `topic` and `partition` are None where the record does not choose. `echo` are the correlation headers and
    the trace, byte for byte, for the reply, the deltas and the dead letter.
    """

    topic: str | None = None
    partition: int | None = None
    echo: tuple[tuple[str, bytes], ...] = ()

    @classmethod
    def from_headers(cls, headers: Headers) -> ReplyRoute:
        """Read a record's headers; raises `ValueError` naming the header that cannot be honoured.

        Whether the topic is allowed is not decided here. Of a header that is there twice the last one counts,
        as everywhere in Kafka. On an error the answer still goes by `ReplyRoute.unrouted(headers)`.
        """
        last = dict(headers)
        topics = {
            name: _topic(name, last[name]) for name in (REPLY_TO, SPRING_REPLY_TOPIC) if last.get(name) is not None
        }
        if len(set(topics.values())) > 1:
            raise ValueError(f"{REPLY_TO} and {SPRING_REPLY_TOPIC} name different topics")
        partition = last.get(SPRING_REPLY_PARTITION)
        echo = echoed(headers)
        if sum(len(name) + len(value) for name, value in echo) > MAX_ECHOED_BYTES:
            raise ValueError(f"{', '.join(sorted({name for name, _ in echo}))}: more than {MAX_ECHOED_BYTES} bytes")
        return cls(
            topic=next(iter(topics.values()), None),
            partition=None if partition is None else _partition(partition),
            echo=echo,
        )

    @classmethod
    def unrouted(cls, headers: Headers) -> ReplyRoute:
        """The default topic, any partition; correlation headers and trace as they came. Raises nothing."""
        return cls(echo=echoed(headers))

    @property
    def has_correlation(self) -> bool:
        """Whether a reply without a request_id could still find the one who asked."""
        return any(name in CORRELATION_HEADERS for name, _ in self.echo)


def echoed(headers: Headers) -> tuple[tuple[str, bytes], ...]:
    """The headers that are sent back, in their order and byte for byte; one without a value is not."""
    return tuple((name, value) for name, value in headers if name in ECHOED_HEADERS and value is not None)


def dead_letter_headers(topic: str, partition: int, offset: int, message: str) -> list[tuple[str, bytes]]:
    """Where a dead letter came from and why, in Spring's formats: int32, int64 big-endian, text in UTF-8."""
    return [
        (DEAD_LETTER_TOPIC, topic.encode()),
        (DEAD_LETTER_PARTITION, partition.to_bytes(4, "big", signed=True)),
        (DEAD_LETTER_OFFSET, offset.to_bytes(8, "big", signed=True)),
        (DEAD_LETTER_MESSAGE, printable(message, limit=MAX_REASON_CHARS).encode()),
    ]


def _topic(name: str, value: bytes) -> str:
    try:
        topic = value.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{name}: not UTF-8") from None
    if not is_topic_name(topic):
        raise ValueError(f"{name}: '{printable(topic, limit=64)}' is not a topic name")
    return topic


def _partition(value: bytes) -> int:
    if len(value) != 4:
        raise ValueError(f"{SPRING_REPLY_PARTITION}: {len(value)} bytes where 4 (big-endian) are expected")
    partition = int.from_bytes(value, "big", signed=True)
    if partition < 0:
        raise ValueError(f"{SPRING_REPLY_PARTITION}: {partition} is not a partition")
    return partition
