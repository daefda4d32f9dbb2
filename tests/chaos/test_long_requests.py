"""Requests that take long, in workers and engines that are killed meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from chaos.answer_book import AnswerBook, write_book
from chaos.reading import read_all
from loramux_producer import ReplyFailed
from loramux_schemas import ErrorCode, Reply, StreamDelta, headers
from loramux_worker.kafka.metadata import decode
from services.kafka import KafkaCluster
from services.serving import client_of, new_topics, worker_of
from services.worker import WorkerProcess
from tiny_models import TinyModel

pytestmark = pytest.mark.kafka

QUICK = 20


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> AnswerBook:
    return write_book(tmp_path_factory.mktemp("book"), num_adapters=2)


def worker_on(kafka: KafkaCluster, book: AnswerBook, topics: dict[str, str], **flags: object) -> WorkerProcess:
    model = TinyModel(book.model, book.adapters, tuple(book.adapter_ids))
    return worker_of(kafka, model, topics, session_timeout="6s", kv_cache_memory="4MiB", **flags)


async def test_others_of_its_partition_are_answered_meanwhile_and_not_again(
    kafka: KafkaCluster, book: AnswerBook
) -> None:
    topics = new_topics(kafka, partitions=1)
    with worker_on(kafka, book, topics) as worker, worker_on(kafka, book, topics, wait=False) as heir:
        async with client_of(kafka, topics, timeout=300) as client:
            slow = await client.submit("slow", max_new_tokens=3000, ignore_eos=True)
            quick = [
                await client.submit(f"quick {i}", adapter_id=book.adapter_ids[i % 2], max_new_tokens=4)
                for i in range(QUICK)
            ]
            assert {reply.status for reply in await asyncio.gather(*quick)} == {"ok"}
            assert not slow.done()
            await until_answered_above_the_watermark(kafka, topics, QUICK)
            assert not slow.done()
            worker.server.kill()
            after = await client.submit("after", max_new_tokens=4)
            assert (await after).worker != (await quick[0]).worker
            assert len((await slow).token_ids) == 3000
            assert heir.server.alive
    replies = [Reply.from_json(m.value()) for m in read_all(kafka.bootstrap_servers, topics["replies_topic"])]
    counts = Counter(reply.request_id for reply in replies)
    assert len(counts) == QUICK + 2
    assert set(counts.values()) == {1}


async def test_a_request_that_three_engines_die_of_is_answered_and_dead_lettered(
    kafka: KafkaCluster, book: AnswerBook
) -> None:
    topics = new_topics(kafka)
    servers = kafka.bootstrap_servers
    with worker_on(kafka, book, topics) as worker:
        async with client_of(kafka, topics, timeout=300) as client:
            stream = client.stream("deadly", max_new_tokens=4000, ignore_eos=True)
            with pytest.raises(ReplyFailed) as failure:
                await kill_what_runs_it(stream, worker)
            assert failure.value.code is ErrorCode.INTERNAL
            assert "3 engines died" in str(failure.value)
            assert worker.log_path.read_text().count('"engine_died"') == 3
            assert (await client.generate("harmless", max_new_tokens=4)).status == "ok"
        assert 'loramux_dead_letters_total{reason="poison"} 1.0' in worker.get("/metrics")
    [letter] = read_all(servers, topics["dead_letter_topic"])
    [request] = [m for m in read_all(servers, topics["requests_topic"]) if b"deadly" in m.value()]
    assert (letter.key(), letter.value()) == (request.key(), request.value())
    said = dict(letter.headers())
    assert said[headers.DEAD_LETTER_MESSAGE] == b"3 engines died while working on this request"
    assert said[headers.DEAD_LETTER_OFFSET] == request.offset().to_bytes(8, "big")
    deltas = [StreamDelta.from_json(m.value()) for m in read_all(servers, topics["stream_topic"])]
    assert [delta.index for delta in deltas] == list(range(len(deltas))), "three engines, one stream: no gap, no repeat"


async def kill_what_runs_it(stream: AsyncIterator[StreamDelta], worker: WorkerProcess) -> None:
    """SIGKILL to each engine that works on a request."""
    killed: set[int] = set()
    async for delta in stream:
        engines = set(worker.engine_pids()) - killed
        if delta.index % 5 == 0 and engines and worker.is_ready():  # an engine that is ready has been given the request
            victim = engines.pop()
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)


async def until_answered_above_the_watermark(kafka: KafkaCluster, topics: dict[str, str], count: int) -> None:
    """Wait until the committed metadata of partition 0 calls that many offsets answered."""
    group = topics["requests_topic"]
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    await admin.start()
    try:
        async with asyncio.timeout(60):
            while True:
                offsets = await admin.list_consumer_group_offsets(group)
                committed = offsets.get(TopicPartition(topics["requests_topic"], 0))
                if committed is not None and len(decode(committed.offset, committed.metadata)) == count:
                    return
                await asyncio.sleep(0.05)
    finally:
        await admin.close()
