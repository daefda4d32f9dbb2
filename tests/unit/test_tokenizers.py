"""Which tokenizer a request gets: one for all adapters with the same text, made once, forgotten in the end."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import tiny_tokenizers
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from loramux_schemas import ErrorCode
from loramux_worker.engine.protocol import AdapterReference
from loramux_worker.errors import RequestFailed
from loramux_worker.text import tokenizers as module
from loramux_worker.text.adapter_text import AdapterText
from loramux_worker.text.tokenizer import Tokenizer
from loramux_worker.text.tokenizers import OWN_PIPELINE, Tokenizers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_tokenizers.save(tmp_path_factory.mktemp("model"), tiny_tokenizers.byte_level())


@pytest.fixture(scope="module")
def base(model: str) -> Tokenizer:
    return Tokenizer.load(model)


@pytest.fixture
async def tokenizers(base: Tokenizer, model: str) -> AsyncIterator[Tokenizers]:
    kept = Tokenizers(base, model)
    yield kept
    kept.close()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[AdapterText]:
    """What tokenizers were made of."""
    texts: list[AdapterText] = []

    class Watched(AdapterText):
        def tokenizer(self, *arguments: object) -> Tokenizer:  # type: ignore[override]
            assert threading.current_thread() is not threading.main_thread()
            texts.append(self)
            return super().tokenizer(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "AdapterText", Watched)
    return texts


def adapter(parent: Path, name: str, **files: str) -> AdapterReference:
    """An adapter with these files, their dots written as underscores."""
    folder = parent / name
    folder.mkdir()
    for key, content in files.items():
        (folder / key.replace("__", ".")).write_text(content)
    return AdapterReference(name, f"sha256:{name}", str(folder))


async def failure(tokenizers: Tokenizers, reference: AdapterReference) -> RequestFailed:
    with pytest.raises(RequestFailed) as failed:
        await tokenizers.of(reference)
    return failed.value


async def test_the_models_for_who_brings_none(tokenizers: Tokenizers, base: Tokenizer, tmp_path: Path) -> None:
    assert await tokenizers.of(None) is base
    plain = [adapter(tmp_path, f"plain-{i}") for i in range(50)]
    assert set(await asyncio.gather(*map(tokenizers.of, plain))) == {base}
    assert len(tokenizers) == 1


async def test_one_for_all_with_the_same_text(tokenizers: Tokenizers, made: list[AdapterText], tmp_path: Path) -> None:
    same = [adapter(tmp_path, f"same-{i}", chat_template__jinja="same") for i in range(20)]
    other = adapter(tmp_path, "other", chat_template__jinja="other")
    found = await asyncio.gather(*map(tokenizers.of, [*same * 3, other]))
    assert len(set(found[:-1])) == 1
    assert found[-1] is not found[0]
    assert [text.files for text in made] == [{"chat_template.jinja": b"same"}, {"chat_template.jinja": b"other"}]
    assert (await tokenizers.of(same[0])).chat_template.text == "same"


async def test_a_new_revision_takes_the_new_text(tokenizers: Tokenizers, tmp_path: Path) -> None:
    first = adapter(tmp_path, "first", chat_template__jinja="first")
    second = adapter(tmp_path, "second", chat_template__jinja="second")
    running = await tokenizers.of(first)
    assert (await tokenizers.of(second)).chat_template.text == "second"
    assert running.chat_template.text == "first"


async def test_a_refusal_is_remembered_and_harms_nobody(
    tokenizers: Tokenizers, base: Tokenizer, made: list[AdapterText], tmp_path: Path
) -> None:
    bad = [adapter(tmp_path, f"bad-{i}", tokenizer__json="{") for i in range(5)]
    good = adapter(tmp_path, "good")
    failures = await asyncio.gather(*(failure(tokenizers, reference) for reference in bad * 2))
    assert {failed.code for failed in failures} == {ErrorCode.ADAPTER_INVALID}
    assert len(made) == 1
    assert await tokenizers.of(good) is base


async def test_a_failing_disk_is_not_remembered(
    tokenizers: Tokenizers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = AdapterReference("gone", "sha256:gone", str(tmp_path / "gone"))
    assert (await failure(tokenizers, gone)).code is ErrorCode.ADAPTER_UNAVAILABLE
    (tmp_path / "gone").mkdir()
    assert await tokenizers.of(gone) is await tokenizers.of(None)

    full = adapter(tmp_path, "full", chat_template__jinja="x")
    with monkeypatch.context() as patch:
        patch.setattr(AdapterText, "tokenizer", lambda *arguments: (_ for _ in ()).throw(OSError(28, "disk full")))
        assert (await failure(tokenizers, full)).code is ErrorCode.ADAPTER_UNAVAILABLE
    assert (await tokenizers.of(full)).chat_template.text == "x"


async def test_cancelling_one_caller_leaves_the_work_to_the_others(tokenizers: Tokenizers, tmp_path: Path) -> None:
    reference = adapter(tmp_path, "a", chat_template__jinja="x")
    first, second = (asyncio.create_task(tokenizers.of(reference)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).chat_template.text == "x"
    assert first.cancelled()


async def test_what_was_not_used_for_longest_is_forgotten(
    base: Tokenizer, model: str, made: list[AdapterText], tmp_path: Path
) -> None:
    tokenizers = Tokenizers(base, model, capacity=3)
    references = [adapter(tmp_path, f"t-{i}", chat_template__jinja=f"{i}") for i in range(4)]
    for reference in (*references[:3], references[0], references[3]):
        await tokenizers.of(reference)
    await asyncio.sleep(0)
    assert len(tokenizers) == 3
    assert len(made) == 4
    await tokenizers.of(references[0])
    assert len(made) == 4, "used again, so kept"
    await tokenizers.of(references[1])
    assert len(made) == 5
    tokenizers.close()


async def test_one_with_a_pipeline_of_its_own_weighs_more(base: Tokenizer, model: str, tmp_path: Path) -> None:
    tokenizers = Tokenizers(base, model, capacity=OWN_PIPELINE + 1)
    backend = Backend.from_str(base.pipeline.definition())
    backend.add_special_tokens([AddedToken("<tool call>", special=True)])
    light = adapter(tmp_path, "light", chat_template__jinja="x")
    heavy = [
        adapter(tmp_path, f"heavy-{i}", tokenizer__json=backend.to_str(), generation_config__json=json.dumps({"i": i}))
        for i in range(2)
    ]
    for reference in (light, heavy[0]):
        await tokenizers.of(reference)
    await asyncio.sleep(0)
    assert len(tokenizers) == 2
    await tokenizers.of(heavy[1])
    await asyncio.sleep(0)
    assert len(tokenizers) == 1
    tokenizers.close()
