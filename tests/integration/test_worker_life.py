"""Workers that stop, die and lose their broker: nobody's request is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from confluent_kafka import Consumer, KafkaError, TopicPartition
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from loramux_producer import ReplyFailed
from loramux_schemas import Reply
from services.kafka import KafkaCluster
from services.serving import client_of, new_topics, worker_of
from tiny_models import TinyModel, make_model

pytestmark = pytest.mark.kafka

REQUESTS, ADAPTERS, NEW_TOKENS = 1000, 50, 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model with many adapters: copies of one with other weights, which is quicker than PEFT's way."""
    tiny = make_model(tmp_path_factory.mktemp("model"), "llama", num_adapters=1)
    first = tiny.adapters / tiny.adapter_ids[0]
    weights = load_file(first / "adapter_model.safetensors")
    for i in range(ADAPTERS):
        folder = tiny.adapters / f"many/{i}"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_bytes((first / "adapter_config.json").read_bytes())
        generator = torch.Generator().manual_seed(i)
        other = {name: torch.randn(w.shape, generator=generator) * 0.2 for name, w in weights.items()}
        save_file(other, folder / "adapter_model.safetensors")
    return TinyModel(tiny.path, tiny.adapters, tuple(f"many/{i}" for i in range(ADAPTERS)))


async def test_every_request_is_answered_when_workers_stop_and_die(
    kafka: KafkaCluster, model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    topics = new_topics(kafka, partitions=8)
    flags = {"session_timeout": "8s", "max_batch_sequences": 16, "look_ahead": 128}

    def worker():
        return worker_of(kafka, model, topics, **flags)

    with worker() as stopped, worker() as killed:
        async with client_of(kafka, topics, timeout=300) as client:
            answered = [
                await client.submit(f"question {i}", adapter_id=f"many/{i % ADAPTERS}", max_new_tokens=NEW_TOKENS)
                for i in range(REQUESTS)
            ]
            await until(lambda: sum(f.done() for f in answered) >= REQUESTS // 4)
            # not waited for: with the drain's time the other worker might answer all that is left
            stopping = asyncio.create_task(asyncio.to_thread(stopped.server.stop))
            await until(lambda: sum(f.done() for f in answered) >= REQUESTS // 2)
            killed.server.kill()
            before = sum(f.done() for f in answered)
            exit_code = await stopping
            with worker() as replacement:
                replies = await asyncio.gather(*answered)
                exit_code_of_replacement = await asyncio.to_thread(replacement.server.stop)
    assert exit_code == 0
    assert exit_code_of_replacement == 0
    assert before < REQUESTS, "the kill came half way"
    assert len({reply.request_id for reply in replies}) == REQUESTS
    final = every_reply(kafka, topics["replies_topic"])
    counts = Counter(reply.request_id for reply in final)
    assert set(counts) == {reply.request_id for reply in replies}
    duplicates = sum(counts.values()) - REQUESTS
    with capsys.disabled():
        print(f"\n{REQUESTS} requests, one worker stopped, one killed: 0 lost, {duplicates} answered twice")
    assert duplicates == 0
    tokenizer = Tokenizer.from_file(str(model.path / "tokenizer.json"))
    reference = TinyModel(model.path, model.adapters, model.adapter_ids[:3]).reference()
    for i, reply in enumerate(replies[:3]):
        expected = reference.generate(tokenizer.encode(f"question {i}").ids, f"many/{i}", NEW_TOKENS)
        assert list(reply.token_ids) == expected


async def test_a_broker_that_goes_away_is_waited_for(model: TinyModel) -> None:
    with KafkaCluster() as kafka:
        topics = new_topics(kafka)
        with worker_of(kafka, model, topics) as worker:
            async with client_of(kafka, topics) as client:
                await client.generate("before", max_new_tokens=4)
                slow = await client.submit("during", max_new_tokens=400, ignore_eos=True)
                await asyncio.to_thread(kafka.stop_broker, 0)
                await until(lambda: not worker.is_ready())
                assert worker.server.alive
                await asyncio.to_thread(kafka.start_broker, 0)
                assert (await slow).status == "ok"
                await until(lambda: worker.is_ready())
                assert (await client.generate("after", max_new_tokens=4)).status == "ok"
            assert worker.server.stop() == 0


async def test_an_engine_that_dies_is_replaced(kafka: KafkaCluster, model: TinyModel) -> None:
    topics = new_topics(kafka)
    with worker_of(kafka, model, topics) as worker:
        async with client_of(kafka, topics) as client:
            whole = await client.generate("long", max_new_tokens=300, ignore_eos=True)
            stream = client.stream("long", max_new_tokens=300, ignore_eos=True)
            deltas = []
            async for delta in stream:
                deltas.append(delta)
                if len(deltas) == 5:
                    kill_engine(worker.server.pid)
            assert stream.reply.token_ids == whole.token_ids
            assert "".join(d.text for d in deltas) == whole.generated_text
            with pytest.raises(ReplyFailed):
                await client.generate("x", adapter_id="many/none")
        assert "engine_died" in worker.log_path.read_text()


def kill_engine(front: int) -> None:
    """SIGKILL to the engine process of a front."""
    children = Path(f"/proc/{front}/task/{front}/children").read_text().split()
    engines = [int(c) for c in children if b"engine.process" in Path(f"/proc/{c}/cmdline").read_bytes()]
    assert len(engines) == 1
    os.kill(engines[0], signal.SIGKILL)


async def until(condition, seconds: float = 120.0) -> None:
    """Wait for a condition."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited too long"
        await asyncio.sleep(0.05)


def every_reply(kafka: KafkaCluster, topic: str) -> list[Reply]:
    """All that is in the replies topic, as a read_committed reader finds it."""
    consumer = Consumer(
        {
            "bootstrap.servers": kafka.bootstrap_servers,
            "group.id": "checker",
            "enable.auto.commit": False,
            "enable.partition.eof": True,  # offsets cannot be counted: transaction markers take some
            "isolation.level": "read_committed",
        }
    )
    try:
        unread = set(consumer.list_topics(topic).topics[topic].partitions)
        consumer.assign([TopicPartition(topic, number, 0) for number in unread])
        replies = []
        while unread:
            for message in consumer.consume(500, timeout=5):
                if message.error() is None:
                    replies.append(Reply.from_json(message.value()))
                else:
                    assert message.error().code() == KafkaError._PARTITION_EOF, message.error()
                    unread.discard(message.partition())
        return replies
    finally:
        consumer.close()
