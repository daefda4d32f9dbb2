"""An adapter's own tokenizer, chat template and ends of sequence, beside what transformers makes of its folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from loramux_schemas import ErrorCode
from loramux_worker.adapters.invalid import AdapterInvalid
from loramux_worker.errors import RequestFailed
from loramux_worker.text.adapter_text import AdapterText
from loramux_worker.text.tokenizer import Tokenizer

OWN_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}<|assistant|>"
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "日本 <tool call> fox 😀"}]
TEXTS = ["The quick brown fox", "  two  spaces\n", "日本語 <é>", "</s><tool call>"]
BACKENDS: dict[str, Callable[[], str]] = {
    "byte_level": tiny_tokenizers.byte_level,
    "sentencepiece": tiny_tokenizers.sentencepiece,
}


@pytest.fixture(scope="module", params=sorted(BACKENDS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    path = tiny_tokenizers.save(folder, BACKENDS[request.param]())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    return path


@pytest.fixture(scope="module")
def base(model: str) -> Tokenizer:
    return Tokenizer.load(model)


def fine_tuned(model: str, folder: Path, **changes: Any) -> Any:
    """What a training script saves beside its adapter."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def own(folder: Path, base: Tokenizer, model: str) -> Tokenizer:
    return AdapterText(folder).tokenizer(base, model)


def refusal(folder: Path, base: Tokenizer, model: str) -> str:
    with pytest.raises(AdapterInvalid) as refused:
        own(folder, base, model)
    assert refused.value.reason.isprintable()
    assert len(refused.value.reason) < 500
    return refused.value.reason


def added(model: str) -> str:
    """A token of the vocabulary that is not special."""
    return "<tool call>" if "<tool call>" in AutoTokenizer.from_pretrained(model).get_vocab() else "<tool>"


def test_without_text_it_is_the_models(model: str, base: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing of text")
    assert own(tmp_path, base, model) is base


def test_own_files_say_what_transformers_says(model: str, base: Tokenizer, tmp_path: Path) -> None:
    theirs = fine_tuned(model, tmp_path, chat_template=OWN_TEMPLATE, eos_token=added(model))
    ours = own(tmp_path, base, model)
    assert ours.encode_messages(MESSAGES) == theirs.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    for text in TEXTS:
        assert ours.encode_prompt(text) == theirs.encode(text)
        for skip in (True, False):
            ids = theirs.encode(text)
            assert ours.decode(ids, skip) == theirs.decode(ids, skip, clean_up_tokenization_spaces=False)
    end = theirs.eos_token_id
    assert end != base.end_token_id
    assert ours.eos_token_ids == (*base.eos_token_ids, end)
    assert ours.is_special(end)
    assert not base.is_special(end)


def test_the_same_tokenizer_is_shared(model: str, base: Tokenizer, tmp_path: Path) -> None:
    fine_tuned(model, tmp_path, chat_template=OWN_TEMPLATE)
    ours = own(tmp_path, base, model)
    assert ours.pipeline is base.pipeline
    assert ours.eos_token_ids == base.eos_token_ids
    assert ours.encode_messages(MESSAGES) != base.encode_messages(MESSAGES)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_alone(model: str, base: Tokenizer, tmp_path: Path, name: str) -> None:
    content = (
        OWN_TEMPLATE if name.endswith("jinja") else json.dumps({"chat_template": OWN_TEMPLATE, "eos_token": "<s>"})
    )
    (tmp_path / name).write_text(content)
    ours = own(tmp_path, base, model)
    text = ours.chat_template.render(MESSAGES[:1])
    assert text == f"<|system|>Be kind.{'</s>' if name.endswith('jinja') else '<s>'}<|assistant|>"
    assert ours.encode_messages(MESSAGES[:1]) == base.pipeline.encode(text, add_special_tokens=False)


def test_a_tokenizer_without_template_uses_the_models(model: str, base: Tokenizer, tmp_path: Path) -> None:
    fine_tuned(model, tmp_path, chat_template=None, bos_token="</s>")
    ours = own(tmp_path, base, model)
    assert ours.chat_template.render(MESSAGES) == base.chat_template.render(MESSAGES).replace("<s>", "</s>")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [7, 9, 7]}, (7, 9)),
        ({"eos_token_id": None}, (2, 3)),
        ({}, (2, 3)),
    ],
)
def test_its_generation_config_says_where_it_ends(
    model: str, base: Tokenizer, tmp_path: Path, content: dict[str, Any], expected: tuple[int, ...]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    ours = own(tmp_path, base, model)
    assert ours.eos_token_ids == expected
    assert (ours.pipeline, ours.chat_template) == (base.pipeline, base.chat_template)
    chosen = fine_tuned(model, tmp_path, eos_token=added(model)).eos_token_id
    assert own(tmp_path, base, model).eos_token_ids == (*expected, chosen)


def test_tokens_added_behind_the_models_are_taken(model: str, base: Tokenizer, tmp_path: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(model)
    theirs.add_special_tokens({"pad_token": "<new>"})
    theirs.save_pretrained(tmp_path)
    ours = own(tmp_path, base, model)
    assert ours.encode_prompt("a<new>") == theirs.encode("a<new>")
    assert max(ours.encode_prompt("a<new>")) == max(base.pipeline.vocabulary().values()) + 1


def test_another_vocabulary_is_refused(model: str, base: Tokenizer, tmp_path: Path) -> None:
    definition = json.loads(base.pipeline.definition())
    *others, last = definition["added_tokens"]

    def reason(added_tokens: list[dict[str, Any]]) -> str:
        (tmp_path / "tokenizer.json").write_text(json.dumps({**definition, "added_tokens": added_tokens}))
        return refusal(tmp_path, base, model)

    missing = reason(others)
    assert (
        f"'{last['content'].encode('ascii', 'backslashreplace').decode()}', token {last['id']} of the model" in missing
    )
    assert "is no token there" in missing
    assert "remove its tokenizer files" in missing
    assert "token" in reason([*others, {**last, "content": "<another>"}])


def test_another_order_of_the_vocabulary_is_refused(model: str, base: Tokenizer, tmp_path: Path) -> None:
    definition = json.loads(base.pipeline.definition())
    vocabulary = definition["model"]["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    else:
        vocabulary[-1], vocabulary[-2] = vocabulary[-2], vocabulary[-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    assert "is not the model's: " in refusal(tmp_path, base, model)


def test_another_decoder_is_refused(model: str, base: Tokenizer, tmp_path: Path) -> None:
    backend = Backend.from_str(base.pipeline.definition())
    (tmp_path / "tokenizer.json").write_text(tiny_tokenizers.hidden_decoder(backend))
    assert "turns tokens into text otherwise" in refusal(tmp_path, base, model)


def test_a_token_may_become_special(model: str, base: Tokenizer, tmp_path: Path) -> None:
    backend = Backend.from_str(base.pipeline.definition())
    backend.add_special_tokens([AddedToken(added(model), special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    token_id = backend.token_to_id(added(model))
    ours = own(tmp_path, base, model)
    assert ours.is_special(token_id)
    assert ours.decode([token_id], True) == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff" * 100),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"tokenizer_class": "CTRLTokenizer"}'),
        ("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}'),
        ("tokenizer_config.json", b'{"tokenizer_object": {"a": 1}}'),
        ("chat_template.jinja", b"\xff"),
        ("generation_config.json", b"{"),
        ("generation_config.json", b'{"eos_token_id": "</s>"}'),
    ],
)
def test_files_that_cannot_be_used_are_named(
    model: str, base: Tokenizer, tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    reason = refusal(tmp_path, base, model)
    assert "tokenizer" in reason or name in reason
    assert str(tmp_path.parent) not in reason


def test_a_pipe_or_too_many_bytes_are_no_text(
    model: str, base: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    assert refusal(tmp_path, base, model) == "tokenizer.json is not a regular file"
    (tmp_path / "tokenizer.json").rmdir()
    (tmp_path / "chat_template.jinja").write_bytes(b" " * ((4 << 20) + 1))
    assert refusal(tmp_path, base, model) == "chat_template.jinja has more than 4194304 bytes"
    with pytest.raises(RequestFailed) as failure:
        AdapterText(tmp_path / "gone")
    assert failure.value.code is ErrorCode.ADAPTER_UNAVAILABLE


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "the adapter's chat template refuses them"),
        ("{{ raise_exception('only one') }}", "the adapter's chat template refuses them: only one"),
        ("{{ ''.__class__.__mro__ }}", "the adapter's chat template refuses them"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "the adapter's chat template takes more than 1 s",
        ),
    ],
)
def test_a_broken_template_fails_messages_alone(
    model: str, base: Tokenizer, tmp_path: Path, template: str, reason: str
) -> None:
    (tmp_path / "chat_template.jinja").write_text(template)
    ours = own(tmp_path, base, model)
    assert ours.encode_prompt("x") == base.encode_prompt("x")
    with pytest.raises(RequestFailed) as refused:
        ours.encode_messages(MESSAGES)
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    assert refused.value.message.startswith(f"messages: {reason}")


def test_the_digest_is_that_of_the_text(tmp_path: Path) -> None:
    empty = AdapterText(tmp_path).digest
    (tmp_path / "adapter_config.json").write_text("{}")
    assert AdapterText(tmp_path).digest == empty
    (tmp_path / "chat_template.jinja").write_text("a")
    one = AdapterText(tmp_path).digest
    (tmp_path / "chat_template.jinja").rename(tmp_path / "tokenizer.json")
    assert len({empty, one, AdapterText(tmp_path).digest}) == 3


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 500) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_files_hold_it_is_used_or_refused(
    model: str, base: Tokenizer, tmp_path: Path, data: st.DataObject
) -> None:
    definition = json.loads(base.pipeline.definition())
    part = data.draw(st.sampled_from([*definition, "model.vocab", "model.type", "added_tokens.0"]))
    value = data.draw(json_values)
    first, _, second = part.partition(".")
    if second:
        definition[first][int(second) if second.isdigit() else second] = value
    else:
        definition[first] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    config = data.draw(
        st.dictionaries(
            st.sampled_from(["eos_token", "chat_template", "tokenizer_class", "added_tokens_decoder", "vocab_file"]),
            json_values,
            max_size=3,
        )
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with contextlib.suppress(AdapterInvalid):
        ours = own(tmp_path, base, model)
        assert base.pipeline.vocabulary().items() <= ours.pipeline.vocabulary().items()
        with contextlib.suppress(RequestFailed):
            ours.encode_messages(MESSAGES)
