"""Two requests of Kafka's protocol in versions that aiokafka does not speak: those that a group's members need to
commit in transactions of their own (KIP-447).

    OffsetFetchRequest         version 7: says of which partitions a transaction has yet to end, instead of telling
                               what was committed before it
    TxnOffsetCommitRequest     version 3: the coordinator refuses offsets of a former generation of the group
"""

from __future__ import annotations

from collections.abc import Collection

from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.commit import OffsetFetchRequest_v3
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Int64,
    Schema,
    TaggedFields,
)

UTF8 = CompactString("utf-8")


class OffsetFetchResponse7(Response):  # type: ignore[misc]
    """`topics`: (name, [(partition, offset, leader epoch, metadata, error code, tags)], tags)."""

    API_KEY = 9
    API_VERSION = 7
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            CompactArray(
                ("topic", UTF8),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("offset", Int64),
                        ("leader_epoch", Int32),
                        ("metadata", UTF8),
                        ("error_code", Int16),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("error_code", Int16),
        ("tags", TaggedFields),
    )


class OffsetFetchRequest7(RequestStruct):  # type: ignore[misc]
    """Asks for stable offsets alone where `require_stable`."""

    FLEXIBLE_VERSION = True
    API_KEY = 9
    API_VERSION = 7
    RESPONSE_TYPE = OffsetFetchResponse7
    SCHEMA = Schema(
        ("group_id", UTF8),
        ("topics", CompactArray(("topic", UTF8), ("partitions", CompactArray(Int32)), ("tags", TaggedFields))),
        ("require_stable", Boolean),
        ("tags", TaggedFields),
    )


class OffsetFetchRequest(Request[OffsetFetchRequest_v3 | OffsetFetchRequest7]):  # type: ignore[misc]
    """What a group has committed for partitions of one topic. Brokers before 2.5 know nothing of stable offsets."""

    API_KEY = 9

    def __init__(self, group_id: str, topic: str, partitions: Collection[int]) -> None:
        self._group_id = group_id
        self._topic = topic
        self._partitions = list(partitions)

    def build(
        self, request_struct_class: type[OffsetFetchRequest_v3 | OffsetFetchRequest7]
    ) -> OffsetFetchRequest_v3 | OffsetFetchRequest7:
        """The request in the newest version that the broker speaks."""
        if request_struct_class is OffsetFetchRequest7:
            return OffsetFetchRequest7(self._group_id, [(self._topic, self._partitions, {})], True, {})
        return OffsetFetchRequest_v3(self._group_id, [(self._topic, self._partitions)])


class TxnOffsetCommitResponse3(Response):  # type: ignore[misc]
    """`topics`: (name, [(partition, error code, tags)], tags)."""

    API_KEY = 28
    API_VERSION = 3
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            CompactArray(
                ("topic", UTF8),
                ("partitions", CompactArray(("partition", Int32), ("error_code", Int16), ("tags", TaggedFields))),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class TxnOffsetCommitRequest3(RequestStruct):  # type: ignore[misc]
    """Offsets of a transaction, from a member of the group."""

    FLEXIBLE_VERSION = True
    API_KEY = 28
    API_VERSION = 3
    RESPONSE_TYPE = TxnOffsetCommitResponse3
    SCHEMA = Schema(
        ("transactional_id", UTF8),
        ("group_id", UTF8),
        ("producer_id", Int64),
        ("producer_epoch", Int16),
        ("generation", Int32),
        ("member_id", UTF8),
        ("group_instance_id", UTF8),
        (
            "topics",
            CompactArray(
                ("topic", UTF8),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("offset", Int64),
                        ("leader_epoch", Int32),
                        ("metadata", UTF8),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class TxnOffsetCommitRequest(Request[TxnOffsetCommitRequest3]):  # type: ignore[misc]
    """`fields` are those of the request, without its tags."""

    API_KEY = 28

    def __init__(self, *fields: object) -> None:
        self._fields = fields

    def build(self, request_struct_class: type[TxnOffsetCommitRequest3]) -> TxnOffsetCommitRequest3:
        """The request in the only version that names the member."""
        return request_struct_class(*self._fields, {})
