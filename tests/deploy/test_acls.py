"""The users and topics of deploy/kubernetes/kafka on a real, guarded Kafka: what each needs works, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    MessageSizeTooLargeError,
    TransactionalIdAuthorizationFailed,
)
from confluent_kafka import OFFSET_END, Consumer, ConsumerGroupTopicPartitions, Producer
from confluent_kafka import TopicPartition as Named
from confluent_kafka.admin import OffsetSpec

from conftest import installed
from deploy.guarded_kafka import GuardedKafka, admin_of
from deploy.manifests import DEPLOY, rendered
from loramux_producer import Client
from loramux_schemas import KafkaConnection
from services.worker import WorkerProcess

pytestmark = pytest.mark.kafka

WORKER, CLIENT, SCALER = "loramux-worker", "loramux-client", "loramux-scaler"
REQUESTS, REPLIES, STREAM = "lora.requests", "lora.replies", "lora.stream"
DEAD, CONTROL = "lora.dead-letters", "lora.control"


@pytest.fixture(scope="module")
def guarded() -> Iterator[GuardedKafka]:
    with installed():
        manifests = rendered("kafka")
        with GuardedKafka() as kafka:
            kafka.set_up(manifests)
            yield kafka


@pytest.fixture(scope="module")
def worker(guarded: GuardedKafka) -> Iterator[WorkerProcess]:
    flags = {**guarded.connection(WORKER), "device": "cpu"}
    with WorkerProcess(guarded.guarded_servers, DEPLOY / "demo" / "model", **flags) as running:
        yield running


async def test_a_worker_answers_a_client(guarded: GuardedKafka, worker: WorkerProcess) -> None:
    connection = KafkaConnection(bootstrap_servers=guarded.guarded_servers, **guarded.connection(CLIENT))
    async with Client(connection=connection, timeout=60) as client:
        stream = client.stream("Where is my order 4821?", max_new_tokens=4)
        text = "".join([delta.text async for delta in stream])
        assert text == stream.reply.generated_text
        assert stream.reply.usage.completion_tokens == 4
    assert worker.metric("loramux_requests_total") == 1
    assert "authorization" not in worker.log_path.read_text().lower()


def test_the_scaler_sees_lag_and_no_request(guarded: GuardedKafka, worker: WorkerProcess) -> None:
    admin = admin_of(guarded, SCALER)
    [committed] = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions("loramux")]).values()
    assert {each.topic for each in committed.result(30).topic_partitions} == {REQUESTS}
    for latest in admin.list_offsets({Named(REQUESTS, 0): OffsetSpec.latest()}).values():
        assert latest.result(30).offset >= 0
    assert set(admin.list_topics(timeout=30).topics) == {REQUESTS}


async def test_a_worker_commits_replies_and_offsets_in_one_transaction(guarded: GuardedKafka) -> None:
    producer = AIOKafkaProducer(**guarded.aiokafka(WORKER), transactional_id=f"loramux.loramux-x.{REQUESTS}.0")
    await producer.start()
    try:
        async with producer.transaction():
            await producer.send_and_wait(REPLIES, b"{}")
            await producer.send_and_wait(DEAD, b"{}")
            await producer.send_offsets_to_transaction({TopicPartition(REQUESTS, 0): 0}, "loramux-x")
    finally:
        await producer.stop()


async def test_a_worker_may_not_fence_the_transactions_of_others(guarded: GuardedKafka) -> None:
    producer = AIOKafkaProducer(**guarded.aiokafka(WORKER), transactional_id="payments.0")
    with pytest.raises(TransactionalIdAuthorizationFailed):
        await producer.start()
    await producer.stop()


@pytest.mark.parametrize(
    ("user", "topic", "may"),
    [
        (CLIENT, REQUESTS, True),
        (CLIENT, CONTROL, True),
        (CLIENT, REPLIES, False),
        (CLIENT, DEAD, False),
        (WORKER, REPLIES, True),
        (WORKER, REQUESTS, False),
        (WORKER, CONTROL, False),
        (SCALER, REQUESTS, False),
    ],
)
def test_who_may_write_where(guarded: GuardedKafka, user: str, topic: str, may: bool) -> None:
    errors = []
    producer = Producer({**guarded.librdkafka(user), "message.timeout.ms": 20_000})
    # a tombstone: nothing that the worker of this module has to answer
    producer.produce(topic, key=b"k", partition=0, on_delivery=lambda error, _: errors.append(error))
    assert producer.flush(30) == 0
    assert [error and error.name() for error in errors] == [None if may else "TOPIC_AUTHORIZATION_FAILED"]


@pytest.mark.parametrize(
    ("user", "topic", "may"),
    [(WORKER, CONTROL, True), (CLIENT, REPLIES, True), (CLIENT, REQUESTS, False)],
)
def test_who_may_read_what(guarded: GuardedKafka, user: str, topic: str, may: bool) -> None:
    # librdkafka wants a group even where it only assigns, and says that it may not join it: no news here
    options = {"group.id": "nobody", "enable.auto.commit": False, "enable.partition.eof": True}
    consumer = Consumer({**guarded.librdkafka(user), **options})
    try:
        consumer.assign([Named(topic, 0, OFFSET_END)])
        answers = iter(lambda: consumer.poll(30), None)
        names = (answer.error().name() for answer in answers)
        said = next(name for name in names if name != "GROUP_AUTHORIZATION_FAILED")
        assert said == ("_PARTITION_EOF" if may else "TOPIC_AUTHORIZATION_FAILED")
    finally:
        consumer.close()


def test_dead_letters_are_not_even_seen_by_clients(guarded: GuardedKafka) -> None:
    seen = set(admin_of(guarded, CLIENT).list_topics(timeout=30).topics)
    assert seen == {REQUESTS, REPLIES, STREAM, CONTROL}


async def test_a_client_may_not_join_the_workers(guarded: GuardedKafka) -> None:
    consumer = AIOKafkaConsumer(REPLIES, **guarded.aiokafka(CLIENT), group_id="loramux")
    with pytest.raises(GroupAuthorizationFailedError):
        await consumer.start()
    await consumer.stop()


@pytest.mark.parametrize("codec", ["gzip", "zstd", "lz4", "snappy"])
async def test_the_broker_refuses_what_unpacks_beyond_the_limit(guarded: GuardedKafka, codec: str) -> None:
    """Packed, it is far below max.message.bytes; the topic stores unpacked, and its limit holds for that."""
    producer = AIOKafkaProducer(**guarded.aiokafka(CLIENT), compression_type=codec, max_request_size=8 << 20)
    await producer.start()
    try:
        with pytest.raises(MessageSizeTooLargeError):
            await producer.send_and_wait(REQUESTS, bytes(4 << 20), partition=1)
    finally:
        await producer.stop()
