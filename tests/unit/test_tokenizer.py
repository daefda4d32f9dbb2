from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers

from loramux_schemas import ErrorCode
from loramux_worker.errors import ConfigurationError, RequestFailed
from loramux_worker.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizers.save(tmp_path_factory.mktemp("bytes"), tiny_tokenizers.byte_level()))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizers.save(tmp_path_factory.mktemp("sp"), tiny_tokenizers.sentencepiece()))


def ids(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    by_token = {tokenizer.token(i): i for i in range(1000)}
    return [by_token[token] for token in tokens]


def test_a_prompt_gets_the_default_special_tokens_once(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode_prompt("The fox 😀")
    assert byte_level.token(token_ids[0]) == "<s>"
    assert token_ids.count(token_ids[0]) == 1
    assert byte_level.decode(token_ids, True) == "The fox 😀"
    assert byte_level.decode(token_ids, False) == "<s>The fox 😀"


def test_a_conversation_gets_those_of_the_template_only(byte_level: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "日本"}]
    token_ids = byte_level.encode_messages(messages)
    assert byte_level.decode(token_ids, False) == "<s>[system] Be kind.\n[user] 日本\n[assistant] "
    assert token_ids.count(token_ids[0]) == 1


def test_a_template_may_refuse(byte_level: Tokenizer) -> None:
    with pytest.raises(RequestFailed, match=r"^messages: .*no role king$") as caught:
        byte_level.encode_messages([{"role": "king", "content": "x"}])
    assert caught.value.code is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ messages[0].content.x.y }}",
        "{{ 1 / 0 }}",
        "{% for %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[7].content + 1 }}",
        "{{ raise_exception('a\nb' * 1000) }}",
    ],
)
def test_no_template_or_a_broken_one_fails_the_request_alone(tmp_path: Path, template: str | None) -> None:
    folder = tiny_tokenizers.save(tmp_path, tiny_tokenizers.byte_level(), chat_template=template)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode_prompt("x")
    with pytest.raises(RequestFailed, match=r"^messages: ") as caught:
        tokenizer.encode_messages([{"role": "user", "content": "x"}])
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400
    if template is None:
        assert "has no chat template" in caught.value.message


def test_a_template_in_its_own_file(tmp_path: Path) -> None:
    folder = tiny_tokenizers.save(tmp_path, tiny_tokenizers.byte_level(), chat_template=None)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode_messages([{"role": "user", "content": "x"}]), False) == "<x>"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 1, 7]}, {"eos_token_id": 3}, (7, 1)),
        ({"eos_token_id": 5}, {}, (5,)),
        ({}, {"eos_token_id": 3}, (3,)),
        (None, {"eos_token_id": [3, 4]}, (3, 4)),
        (None, {"text_config": {"eos_token_id": 6}}, (6,)),
        (None, {"eos_token_id": None}, (1,)),
        (None, None, (1,)),
    ],
)
def test_eos_tokens_come_from_the_first_file_that_names_them(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    folder = tiny_tokenizers.save(tmp_path, tiny_tokenizers.byte_level())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert Tokenizer.load(folder).eos_token_ids == expected


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}'])
def test_a_broken_generation_config_is_named(tmp_path: Path, content: str) -> None:
    folder = tiny_tokenizers.save(tmp_path, tiny_tokenizers.byte_level())
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"--model: .*generation_config\.json"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": '{"model_type": "gpt2"}'},
        {"config.json": '{"model_type": "llama"}'},
        {"config.json": '{"model_type": "llama"}', "tokenizer.json": "{"},
        {"config.json": '{"model_type": "llama"}', "tokenizer.json": "{}"},
        {"tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}'},
        {"tokenizer_config.json": '{"tokenizer_class": "CTRLTokenizer"}', "vocab.json": '{"a": 0}', "merges.txt": ""},
    ],
)
def test_a_folder_without_a_fast_tokenizer_is_refused_in_one_line(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigurationError, match=r"^--model: ") as caught:
        Tokenizer.load(str(tmp_path))
    assert str(caught.value).isprintable()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^--model: "):
        Tokenizer.load(str(tmp_path / "missing"))


def test_a_truncating_and_padding_tokenizer_does_neither(tmp_path: Path) -> None:
    backend = json.loads(tiny_tokenizers.byte_level())
    backend["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    backend["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    tokenizer = Tokenizer.load(tiny_tokenizers.save(tmp_path, json.dumps(backend)))
    text = "The quick brown fox, " * 20
    assert tokenizer.decode(tokenizer.encode_prompt(text), False) == "<s>" + text


def test_token_text_is_the_token_inside_a_text(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    texts = [sentencepiece.token_text(i) for i in ids(sentencepiece, "▁the", "the", "▁", "<s>", "<0x41>", "<0xE2>")]
    assert texts == [" the", "the", " ", "<s>", "A", "\ufffd"]
    (fox,) = ids(byte_level, "Ġfox")
    assert byte_level.token_text(fox) == " fox"
    assert byte_level.token_text(10_000) == sentencepiece.token_text(10_000) == ""


def test_only_special_tokens_are_special(sentencepiece: Tokenizer) -> None:
    flags = [sentencepiece.is_special(i) for i in ids(sentencepiece, "<s>", "</s>", "<tool>", "▁the")]
    assert flags == [True, True, False, False]


def test_many_threads_at_once(byte_level: Tokenizer) -> None:
    texts = [f"thread {n}: 日本語 😀 " * (n + 1) for n in range(40)]

    def work(text: str) -> tuple[list[int], list[int], str]:
        token_ids = byte_level.encode_prompt(text)
        chat = byte_level.encode_messages([{"role": "user", "content": text}])
        return token_ids, chat, byte_level.decode(token_ids, True)

    alone = [work(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, texts * 5)) == alone * 5
    assert [text for _, _, text in alone] == texts
