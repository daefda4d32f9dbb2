"""What comes out of a running worker, through Kafka, is what Hugging Face PEFT generates."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from loramux_producer import Client
from services.kafka import KafkaCluster
from services.worker import WorkerProcess, worker_topics
from tiny_models import CONFIGS, kv_cache_bytes, make_model

pytestmark = pytest.mark.kafka

NEW_TOKENS = 48


# to Kafka GPT-2 is as the others are: the engine's tests see to it
@pytest.mark.parametrize(
    ("architecture", "merged"), [*((name, None) for name in CONFIGS if name != "gpt2"), ("llama", 1)]
)
async def test_greedy_tokens_equal_peft(
    kafka: KafkaCluster, kafka_topics, tmp_path: Path, architecture: str, merged: int | None
) -> None:
    model = make_model(tmp_path, architecture, num_adapters=8)
    rng = random.Random(architecture)
    jobs = []
    for i in range(18):
        # Short prompts run side by side, and outgrow the cache.
        length = (1, 200)[i] if i < 2 else rng.randint(1, 24) if i % 2 else rng.randint(25, 200)
        adapter_id = None if i % 9 == 8 else model.adapter_ids[i % 9]
        jobs.append(([rng.randrange(256) for _ in range(length)], adapter_id))
    topics = worker_topics(kafka_topics)
    merge = {} if merged is None else {"merge_adapter": model.adapter_ids[merged]}
    with WorkerProcess(
        kafka.bootstrap_servers,
        model.path,
        adapter_uri=f"file://{model.adapters}/{{adapter_id}}",
        group_id=topics["requests_topic"],
        max_model_len=256,
        max_batched_tokens=48,  # prompts come in chunks
        block_size=8,
        kv_cache_memory=kv_cache_bytes(model.path, num_blocks=40, block_size=8),  # not enough: preemption
        dtype="float32",
        **merge,
        **topics,
    ) as worker:
        async with Client(
            kafka.bootstrap_servers,
            requests_topic=topics["requests_topic"],
            replies_topic=topics["replies_topic"],
            stream_topic=topics["stream_topic"],
            timeout=300,
        ) as client:
            replies = await asyncio.gather(
                *(
                    client.generate(prompt_token_ids=prompt, adapter_id=adapter_id, max_new_tokens=NEW_TOKENS)
                    for prompt, adapter_id in jobs
                )
            )
        assert await eventually(lambda: worker.metric("loramux_preemptions_total")) > 0
        resident = (
            'loramux_adapters_resident{tier="gpu"}'  # neither the merged one nor what takes it off the base model
        )
        assert await eventually(lambda: worker.metric(resident) == len(model.adapter_ids) - len(merge))
        assert 'adapter=""' not in worker.get("/metrics")
    reference = model.reference()
    for (prompt, adapter_id), reply in zip(jobs, replies, strict=True):
        assert list(reply.token_ids) == reference.generate(prompt, adapter_id, NEW_TOKENS), adapter_id
        assert reply.adapter_id == adapter_id
        assert (reply.revision is None) == (adapter_id is None)
        assert reply.usage.prompt_tokens == len(prompt)


async def eventually(value, seconds: float = 5.0) -> float:
    """The engine sends its figures a few times a second: ask until there is one."""
    for _ in range(int(seconds / 0.1)):
        if (found := value()) > 0:
            return found
        await asyncio.sleep(0.1)
    return value()
