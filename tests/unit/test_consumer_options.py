"""What every consumer of a worker must be told, because aiokafka's defaults lose requests or members."""

from __future__ import annotations

from aiokafka import TopicPartition
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment

from loramux_schemas import KafkaConnection
from loramux_worker.kafka.consumer import consumer_options


def test_positions_and_membership_are_in_our_hands() -> None:
    options = consumer_options(KafkaConnection(), "group", 45.0)
    assert options["enable_auto_commit"] is False
    assert options["auto_offset_reset"] == "none"
    assert options["isolation_level"] == "read_committed"
    assert options["session_timeout_ms"] == 45_000
    assert options["heartbeat_interval_ms"] <= 15_000
    # A JoinGroup is answered only when the rebalance is over.
    assert 30_000 <= options["rebalance_timeout_ms"] < options["request_timeout_ms"]


def test_two_consumers_of_a_process_do_not_share_the_assignors_memory() -> None:
    """aiokafka's sticky assignor remembers the last assignment in its class."""
    first, second = (
        consumer_options(KafkaConnection(), "group", 45.0)["partition_assignment_strategy"][0] for _ in range(2)
    )
    first.on_assignment(ConsumerProtocolMemberAssignment(0, [("requests", [0, 1])], b""))
    assert first.member_assignment == [TopicPartition("requests", 0), TopicPartition("requests", 1)]
    assert second.member_assignment is None
    assert first.name == second.name == "sticky"
