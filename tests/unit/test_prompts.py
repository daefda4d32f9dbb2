"""Prompts that the model cannot take, whoever's tokenizer wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers

from loramux_schemas import ErrorCode, Request
from loramux_worker.adapters.text_files import TOKENIZER_FILE
from loramux_worker.engine.protocol import PROTOCOL_VERSION, Ready
from loramux_worker.errors import RequestFailed
from loramux_worker.prompts import fewest_tokens, prompt_token_ids
from loramux_worker.text.adapter_text import AdapterText
from loramux_worker.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_tokenizers.save(tmp_path_factory.mktemp("model"), tiny_tokenizers.byte_level())


@pytest.fixture(scope="module")
def base(model: str) -> Tokenizer:
    return Tokenizer.load(model)


@pytest.fixture
def grown(model: str, base: Tokenizer, tmp_path: Path) -> Tokenizer:
    """The tokenizer of an adapter with one token more than the model's."""
    definition = json.loads(base.pipeline.definition())
    token = {**definition["added_tokens"][-1], "id": len(base.pipeline.vocabulary()), "content": "<more>"}
    definition["added_tokens"].append(token)
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps(definition))
    return AdapterText(tmp_path).tokenizer(base, model)


def limits(vocab_size: int) -> Ready:
    return Ready(PROTOCOL_VERSION, 64, vocab_size, 8, 16, "cpu", "float32")


def request(**fields: Any) -> Request:
    return Request.from_json(json.dumps({"request_id": "r", **fields}).encode())


async def test_a_token_that_only_the_adapter_knows(base: Tokenizer, grown: Tokenizer) -> None:
    size = len(base.pipeline.vocabulary())
    asked = request(adapter_id="a", prompt="a <more>")
    assert (await prompt_token_ids(asked, grown, limits(size + 1)))[-1] == size
    assert max(await prompt_token_ids(asked, base, limits(size))) < size
    with pytest.raises(RequestFailed, match=rf"holds '<more>', token {size} of the tokenizer") as refused:
        await prompt_token_ids(asked, grown, limits(size))
    assert refused.value.code is ErrorCode.ADAPTER_INVALID
    assert await prompt_token_ids(request(adapter_id="a", prompt="a"), grown, limits(size))


async def test_ids_outside_the_vocabulary_are_the_requests_fault(grown: Tokenizer) -> None:
    with pytest.raises(RequestFailed, match="prompt_token_ids: 500 is outside the vocabulary of 400") as refused:
        await prompt_token_ids(request(adapter_id="a", prompt_token_ids=[500]), grown, limits(400))
    assert refused.value.code is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize(
    ("parameters", "fewest"),
    [
        ({"max_new_tokens": 9}, 1),
        ({"max_new_tokens": 9, "ignore_eos": True}, 9),
        ({"max_new_tokens": 9, "ignore_eos": True, "stop": ["x"]}, 1),
        ({"max_new_tokens": 9, "ignore_eos": True, "stop_token_ids": [3]}, 1),
        ({"max_new_tokens": 9, "min_new_tokens": 4, "stop_token_ids": [3]}, 4),
    ],
)
def test_the_tokens_that_a_request_generates_for_sure(parameters: dict[str, object], fewest: int) -> None:
    value = {"request_id": "r", "prompt": "hi", "parameters": parameters}
    assert fewest_tokens(Request.from_json(json.dumps(value).encode())) == fewest
