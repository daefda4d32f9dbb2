"""Adapters with text of their own through a running worker: what transformers and PEFT make of their folders."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from loramux_producer import Client, ReplyFailed
from services.kafka import KafkaCluster
from services.serving import serving
from tiny_models import Reference, TinyModel, make_model, save_tokenizer

pytestmark = pytest.mark.kafka

NEW_TOKENS = 24
PLAIN, OWN_TOKENIZER, OWN_ENDS, OTHER_VOCABULARY, BROKEN_TEMPLATE = (f"tenant-{i}/tune" for i in range(5))
OWN_TEMPLATE = "{% for m in messages %}<t1>{{ m.role }}: {{ m.content }}<t2>{% endfor %}<t1>assistant: "


@dataclass(frozen=True)
class Expected:
    """What the answer to a conversation must be."""

    messages: list[dict[str, str]]
    prompt: list[int]
    tokens: list[int]
    text: str


def conversation(number: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"question {number}"}]


def expected(reference: Reference, folder: Path, adapter_id: str, number: int, ends: set[int]) -> Expected:
    """As transformers writes the prompt with the tokenizer of `folder`, and PEFT answers it up to one of `ends`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(conversation(number), add_generation_prompt=True, return_dict=False)
    tokens = reference.generate(prompt, adapter_id, NEW_TOKENS)
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    tokens = tokens[: last + 1]
    visible = tokens[:-1] if tokens[-1] in ends else tokens
    return Expected(conversation(number), prompt, tokens, tokenizer.decode(visible, skip_special_tokens=True))


def give_text(model: TinyModel, reference: Reference) -> dict[str, list[Expected]]:
    """Text of every kind for the model's adapters, and the answers that are expected of those with good text."""
    folders = {adapter_id: model.adapters / adapter_id for adapter_id in model.adapter_ids}
    answers = {PLAIN: [expected(reference, model.path, PLAIN, n, {257}) for n in range(8)]}

    tokenizer = AutoTokenizer.from_pretrained(model.path)
    tokenizer.chat_template = OWN_TEMPLATE
    tokenizer.save_pretrained(folders[OWN_TOKENIZER])
    drafts = [expected(reference, folders[OWN_TOKENIZER], OWN_TOKENIZER, n, {257}) for n in range(8)]
    end = next(token for draft in drafts for token in draft.tokens[2:-2] if token > 260)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.save_pretrained(folders[OWN_TOKENIZER])
    answers[OWN_TOKENIZER] = [
        expected(reference, folders[OWN_TOKENIZER], OWN_TOKENIZER, n, {257, end}) for n in range(8)
    ]

    drafts = [expected(reference, model.path, OWN_ENDS, n, {257}) for n in range(8)]
    ends = {drafts[0].tokens[3], drafts[1].tokens[5]}
    (folders[OWN_ENDS] / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(ends)}))
    answers[OWN_ENDS] = [expected(reference, model.path, OWN_ENDS, n, ends) for n in range(8)]

    save_tokenizer(folders[OTHER_VOCABULARY], vocab_size=300)
    (folders[BROKEN_TEMPLATE] / "chat_template.jinja").write_text("{% for %}")
    return answers


async def test_each_adapter_reads_writes_and_ends_in_its_own_way(kafka: KafkaCluster, tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama", num_adapters=5)
    answers = give_text(model, model.reference())
    assert any(len(answer.tokens) < NEW_TOKENS for answer in answers[OWN_TOKENIZER])
    assert all(len(answer.tokens) < NEW_TOKENS for answer in answers[OWN_ENDS][:2])
    with serving(kafka, model, revision_ttl="200ms") as served:
        async with served.client() as client:
            asked = [(adapter_id, answer) for adapter_id, several in answers.items() for answer in several]
            bad = [
                refusal(client, adapter_id=OTHER_VOCABULARY, prompt="hi"),
                refusal(client, adapter_id=BROKEN_TEMPLATE, messages=conversation(0)),
            ]
            prompted = client.generate("hi", adapter_id=BROKEN_TEMPLATE, max_new_tokens=2)
            whole, streamed, refused, plain = await asyncio.gather(
                asyncio.gather(*(ask(client, adapter_id, answer) for adapter_id, answer in asked)),
                asyncio.gather(*(stream(client, adapter_id, answer) for adapter_id, answer in asked)),
                asyncio.gather(*bad),
                prompted,
            )
            await a_new_template_is_taken(client, model.adapters / PLAIN)
    for (_, answer), reply, deltas in zip(asked, whole, streamed, strict=True):
        assert reply.usage.prompt_tokens == len(answer.prompt)
        assert list(reply.token_ids) == answer.tokens
        assert reply.finish_reason == ("length" if len(answer.tokens) == NEW_TOKENS else "eos_token")
        assert reply.generated_text == deltas == answer.text
    assert [error.code for error in refused] == ["adapter_invalid", "invalid_request"]
    assert "'<t42>', token 300 of the model, is no token there" in refused[0].message
    assert "messages: the adapter's chat template refuses them" in refused[1].message
    assert plain.usage.completion_tokens == 2


async def ask(client: Client, adapter_id: str, answer: Expected) -> Any:
    return await client.generate(messages=answer.messages, adapter_id=adapter_id, max_new_tokens=NEW_TOKENS)


async def stream(client: Client, adapter_id: str, answer: Expected) -> str:
    deltas = client.stream(messages=answer.messages, adapter_id=adapter_id, max_new_tokens=NEW_TOKENS)
    return "".join([delta.text async for delta in deltas])


async def refusal(client: Client, **request: Any) -> Any:
    with pytest.raises(ReplyFailed) as failed:
        await client.generate(**request)
    return failed.value.reply.error


async def a_new_template_is_taken(client: Client, folder: Path) -> None:
    """Written beside weights that stay: it makes a new revision, and old ones keep to theirs."""
    asked = {"messages": [{"role": "user", "content": "x"}], "adapter_id": PLAIN, "max_new_tokens": 2}
    before = await client.generate(**asked)
    (folder / "new").write_text("{% for m in messages %}{{ m.content }}{% endfor %}!!")
    shutil.move(folder / "new", folder / "chat_template.jinja")
    after, until = before, time.monotonic() + 30
    while after.revision == before.revision and time.monotonic() < until:
        after = await client.generate(**asked)
    assert after.usage.prompt_tokens == len("x!!")
    pinned = await client.generate(**{**asked, "adapter_id": f"{PLAIN}@{before.revision}"})
    assert (pinned.usage.prompt_tokens, pinned.revision) == (before.usage.prompt_tokens, before.revision)
