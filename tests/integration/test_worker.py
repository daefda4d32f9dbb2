"""A running worker through real Kafka: what it answers, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from bad_adapters import make_bad_adapters
from loramux_producer import ReplyFailed
from loramux_schemas import Reply
from services.kafka import KafkaCluster
from services.serving import Serving, serving
from tiny_models import TinyModel, make_model, save_adapter

pytestmark = pytest.mark.kafka

MAX_RANK = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("model"), "llama", num_adapters=4)


@pytest.fixture(scope="module")
def bad_adapters(model: TinyModel) -> dict[str, str]:
    return make_bad_adapters(model, max_rank=MAX_RANK)


@pytest.fixture(scope="module")
def served(kafka: KafkaCluster, model: TinyModel) -> Iterator[Serving]:
    with serving(
        kafka,
        model,
        max_lora_rank=MAX_RANK,
        model_name="tests/llama",
        revision_ttl="200ms",
        adapters=model.adapter_ids[0],
        reply_topics="mine-*",
    ) as running:
        yield running


async def test_what_is_wrong_with_one_request_harms_no_other(served: Serving, bad_adapters: dict[str, str]) -> None:
    reference = served.model.reference()
    bad: list[tuple[str, dict[str, Any]]] = [
        (code, {"prompt": "hi", "adapter_id": adapter_id}) for adapter_id, code in bad_adapters.items()
    ]
    bad += [
        ("adapter_not_found", {"prompt": "hi", "adapter_id": "nobody/has-this"}),
        ("context_length_exceeded", {"prompt_token_ids": [1] * 600}),
        ("deadline_exceeded", {"prompt": "hi", "deadline_ms": 1}),
        (
            "deadline_exceeded",
            {"prompt": "hi", "deadline_ms": int(time.time() * 1000) - 1, "adapter_id": "tenant-1/tune"},
        ),
        ("invalid_request", {"prompt_token_ids": [1, 2, 100_000]}),
        ("invalid_request", {"prompt": ""}),
    ]
    async with served.client() as client:

        async def refused(fields: dict[str, Any]) -> str:
            try:
                served_anyway = await client.generate(**fields)
            except ReplyFailed as failure:
                reply = failure.reply
            else:
                pytest.fail(f"{fields} was answered: {served_anyway}")
            assert reply.generated_text is None
            assert reply.error.message
            assert "\n" not in reply.error.message
            return reply.error.code

        prompts = [list(f"good {i}".encode()) for i in range(100)]
        adapters = [served.model.adapter_ids[i % 4] for i in range(100)]
        good = asyncio.gather(
            *(
                client.generate(prompt_token_ids=p, adapter_id=a, max_new_tokens=8)
                for p, a in zip(prompts, adapters, strict=True)
            )
        )
        codes = await asyncio.gather(*(refused(fields) for _, fields in bad))
        replies = await good
    assert codes == [code for code, _ in bad]
    for prompt, adapter_id, reply in zip(prompts, adapters, replies, strict=True):
        assert list(reply.token_ids) == reference.generate(prompt, adapter_id, 8)


async def test_messages_that_are_no_request(served: Serving) -> None:
    """Dead letters keep every byte; who can be answered is answered."""
    correlation = uuid.uuid4().bytes
    junk = [
        (b"key", b"not json", [("correlation_id", correlation), ("other", b"\xff")]),
        (b"", b"\xff\xfe", []),
        (b"k", b'{"prompt": "no id"}', []),
        (b"k", b"[" * 900_000, []),
    ]
    wrong = b'{"request_id": "wrong-1", "prompt": "a", "messages": [], "metadata": {"a": 1}}'
    unknown = b'{"request_id": "wrong-2", "prompt": "a", "max_length": 3}'
    async with (
        AIOKafkaProducer(bootstrap_servers=served.kafka.bootstrap_servers) as producer,
        reading(served, "dead_letter_topic") as letters,
        reading(served, "replies_topic") as replies,
    ):
        sent = []
        for key, value, headers in junk:
            sent.append(await producer.send_and_wait(served.topics["requests_topic"], value, key=key, headers=headers))
        for value in (wrong, unknown):
            await producer.send_and_wait(served.topics["requests_topic"], value)
        found = await take(letters, 4)
        answers = await take(replies, 3)
    by_value = {record.value: record for record in found}
    for (key, value, headers), metadata in zip(junk, sent, strict=True):
        record = by_value[value]
        assert record.key == key
        assert list(record.headers)[: len(headers)] == headers
        added = dict(record.headers)
        assert added["kafka_dlt-original-topic"] == served.topics["requests_topic"].encode()
        assert int.from_bytes(added["kafka_dlt-original-partition"], "big") == metadata.partition
        assert int.from_bytes(added["kafka_dlt-original-offset"], "big") == metadata.offset
        assert added["kafka_dlt-exception-message"]
    parsed = {Reply.from_json(record.value).request_id: record for record in answers}
    assert set(parsed) == {None, "wrong-1", "wrong-2"}
    assert dict(parsed[None].headers)["correlation_id"] == correlation
    first = Reply.from_json(parsed["wrong-1"].value)
    assert first.error.code == "invalid_request"
    assert "messages" in first.error.message
    assert first.metadata == {"a": 1}
    assert "max_length" in Reply.from_json(parsed["wrong-2"].value).error.message


async def test_replies_go_where_they_are_asked_to_if_that_is_allowed(served: Serving) -> None:
    topic = f"mine-{uuid.uuid4().hex[:6]}"
    served.kafka.create_topic(topic, 2)
    spring = [("kafka_correlationId", b"\x00\x01"), ("kafka_replyTopic", topic.encode())]
    spring.append(("kafka_replyPartition", (1).to_bytes(4, "big")))
    forbidden = [("reply_to", served.topics["dead_letter_topic"].encode()), ("correlation_id", b"c")]
    body = {"prompt": "x", "parameters": {"max_new_tokens": 2}}
    async with (
        AIOKafkaProducer(bootstrap_servers=served.kafka.bootstrap_servers) as producer,
        reading(served, topic) as mine,
        reading(served, "replies_topic") as default,
    ):
        for request_id, headers in (("allowed", spring), ("forbidden", forbidden)):
            value = json.dumps({"request_id": request_id, **body}).encode()
            await producer.send_and_wait(served.topics["requests_topic"], value, headers=headers)
        (allowed,) = await take(mine, 1)
        (refused,) = await take(default, 1)
    assert allowed.partition == 1
    assert ("kafka_correlationId", b"\x00\x01") in allowed.headers
    assert Reply.from_json(allowed.value).status == "ok"
    assert ("correlation_id", b"c") in refused.headers
    assert Reply.from_json(refused.value).error.code == "invalid_request"


async def test_deltas_concatenate_to_the_text(served: Serving) -> None:
    async with served.client() as client:
        for seed in range(4):
            stream = client.stream("once", do_sample=True, seed=seed, max_new_tokens=40, ignore_eos=True)
            deltas = [delta async for delta in stream]
            reply = stream.reply
            assert "".join(d.text for d in deltas) == reply.generated_text
            assert [t for d in deltas for t in d.token_ids] == list(reply.token_ids)
            assert [d.index for d in deltas] == list(range(len(deltas)))
            assert len(deltas) > 1


async def test_a_seed_repeats_whatever_shares_the_batch(served: Serving) -> None:
    asked = {"do_sample": True, "temperature": 1.3, "top_p": 0.95, "seed": 11, "max_new_tokens": 24, "ignore_eos": True}
    async with served.client() as client:
        alone = await client.generate("seeded", adapter_id="tenant-2/tune", **asked)
        crowd = [client.generate(f"crowd {i}", do_sample=True, seed=i, max_new_tokens=24) for i in range(12)]
        beside, *_ = await asyncio.gather(client.generate("seeded", adapter_id="tenant-2/tune", **asked), *crowd)
        other = await client.generate("seeded", adapter_id="tenant-2/tune", **{**asked, "seed": 12})
    assert alone.token_ids == beside.token_ids
    assert alone.token_ids != other.token_ids


async def test_stop_strings_end_the_text_before_them(served: Serving) -> None:
    async with served.client() as client:
        asked = {"max_new_tokens": 60, "ignore_eos": True, "seed": 3, "do_sample": True}
        whole = await client.generate("stop", **asked)
        stop = whole.generated_text[10:13]
        cut = await client.generate("stop", stop=[stop], **asked)
        by_token = await client.generate("stop", stop_token_ids=[whole.token_ids[5]], **asked)
    assert cut.finish_reason == "stop_sequence"
    assert cut.generated_text == whole.generated_text[: whole.generated_text.index(stop)]
    assert len(cut.token_ids) < 60
    assert by_token.finish_reason == "stop_sequence"
    first = whole.token_ids.index(whole.token_ids[5])
    assert by_token.token_ids == whole.token_ids[: first + 1]


async def test_the_rest_of_the_contract(served: Serving) -> None:
    async with served.client() as client:
        chat = await client.generate(messages=[{"role": "user", "content": "hey"}], max_new_tokens=3, logprobs=2)
        cut = await client.generate("abcdef", truncate=2, max_new_tokens=2, return_full_text=True, metadata={"k": [1]})
        longest = await client.generate(prompt_token_ids=[1] * 500, max_new_tokens=300, ignore_eos=True)
    assert chat.usage.prompt_tokens == len("[user] hey\n[assistant] ")
    assert len(chat.logprobs) == len(chat.token_ids)
    for token, entry in zip(chat.token_ids, chat.logprobs, strict=True):
        assert entry.id == token
        assert len(entry.top) == 2
        assert entry.logprob == pytest.approx(entry.top[0].logprob)  # greedy: the likeliest
    assert cut.usage.prompt_tokens == 2
    assert cut.generated_text.startswith("abcdef")
    assert cut.metadata == {"k": [1]}
    assert longest.finish_reason == "length"
    assert longest.usage.completion_tokens == 12  # the model takes 512


async def test_a_new_revision_is_served_and_named(served: Serving) -> None:
    adapter_id = "tenant-9/changing"
    folder = served.model.adapters / adapter_id
    save_adapter(served.model.path, folder, ["q_proj", "v_proj"], rank=2, seed=50)
    async with served.client() as client:
        before = await client.generate("same", adapter_id=adapter_id, max_new_tokens=6)
        save_adapter(served.model.path, folder, ["q_proj", "v_proj"], rank=4, seed=51)
        after = before
        until = time.monotonic() + 20
        while after.revision == before.revision and time.monotonic() < until:
            after = await client.generate("same", adapter_id=adapter_id, max_new_tokens=6)
        pinned = await client.generate("same", adapter_id=f"{adapter_id}@{before.revision}", max_new_tokens=6)
    assert after.revision != before.revision
    assert after.token_ids != before.token_ids
    assert (pinned.revision, pinned.token_ids) == (before.revision, before.token_ids)
    assert pinned.adapter_id == adapter_id


def test_kcat(served: Serving, kcat: str) -> None:
    """The README's lines, with this test's topics."""
    servers, topics = served.kafka.bootstrap_servers, served.topics
    request = json.dumps({"request_id": "by-hand", "adapter_id": "tenant-1/tune", "prompt": "hello"})
    subprocess.run(
        [kcat, "-P", "-b", servers, "-t", topics["requests_topic"], "-k", "tenant-1/tune", "-H", "correlation_id=42"],
        input=request.encode(),
        check=True,
        timeout=30,
    )
    from_the_beginning = [
        "-X",
        "isolation.level=read_committed",
        "-o",
        "beginning",
        "-e",
        "-q",
        "-f",
        "%h %s\n",
    ]
    until = time.monotonic() + 60
    replies: list[dict[str, Any]] = []
    while not replies and time.monotonic() < until:
        read = subprocess.run(
            [kcat, "-C", "-b", servers, "-t", topics["replies_topic"], *from_the_beginning],
            capture_output=True,
            check=True,
            timeout=30,
        )
        # replies of other tests lie there too, some with headers that are no text
        lines = read.stdout.decode(errors="replace").splitlines()
        mine = "correlation_id=42 "
        replies = [json.loads(line.removeprefix(mine)) for line in lines if line.startswith(mine)]
    assert replies[0]["request_id"] == "by-hand"
    assert replies[0]["status"] == "ok"
    assert replies[0]["adapter_id"] == "tenant-1/tune"


def test_metrics_and_probes(served: Serving) -> None:
    assert served.worker.get("/healthz") == "ok\n"
    assert served.worker.get("/readyz") == "ready\n"
    assert served.worker.metric("loramux_requests_total") > 0
    page = served.worker.get("/metrics")
    for name in (
        "adapters_resident",
        "kafka_lag",
        "time_to_first_token_seconds",
        "kv_cache_usage_ratio",
        "batch_adapters",
        "adapter_service_total{adapter=",
        "adapter_deficit{adapter=",
    ):
        assert f"loramux_{name}" in page


@contextlib.asynccontextmanager
async def reading(served: Serving, topic: str) -> AsyncIterator[AIOKafkaConsumer]:
    """A consumer that stands at the end of a topic (a flag of `served.topics`, or a name)."""
    name = served.topics.get(topic, topic)
    async with AIOKafkaConsumer(bootstrap_servers=served.kafka.bootstrap_servers) as consumer:
        described = served.kafka.admin().list_topics(name).topics[name]
        partitions = [TopicPartition(name, number) for number in described.partitions]
        consumer.assign(partitions)
        await consumer.seek_to_end(*partitions)
        for partition in partitions:
            await consumer.position(partition)
        yield consumer


async def take(consumer: AIOKafkaConsumer, count: int, seconds: float = 60.0) -> list[Any]:
    """The next `count` records."""
    records: list[Any] = []
    until = time.monotonic() + seconds
    while len(records) < count and time.monotonic() < until:
        for batch in (await consumer.getmany(timeout_ms=500)).values():
            records += batch
    assert len(records) == count
    return records
