from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import tiny_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_worker.text.detokenizer import IncrementalDetokenizer
from loramux_worker.text.tokenizer import Tokenizer

BUILDERS: dict[str, Callable[[], str]] = {
    "byte_level": tiny_tokenizers.byte_level,
    "llama": lambda: tiny_tokenizers.sentencepiece("llama"),
    "gemma": lambda: tiny_tokenizers.sentencepiece("gemma"),
    "t5": lambda: tiny_tokenizers.sentencepiece("t5"),
    "word_piece": tiny_tokenizers.word_piece,
    "hidden_bytes": tiny_tokenizers.hidden_bytes,
}


class Counting(Tokenizer):
    """Counts the tokens that are decoded."""

    decoded = 0

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        self.decoded += len(token_ids)
        return super().decode(token_ids, skip_special_tokens)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counting]:
    def load(name: str) -> Counting:
        tokenizer = Counting.load(tiny_tokenizers.save(tmp_path_factory.mktemp(name), BUILDERS[name]()))
        assert isinstance(tokenizer, Counting)
        return tokenizer

    return {name: load(name) for name in BUILDERS}


def ids(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    by_token = {tokenizer.token(i): i for i in range(1000)}
    return [by_token[token] for token in tokens]


def pieces(tokenizer: Tokenizer, prompt: list[int], generated: list[int], skip: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.push([token_id]) for token_id in generated), detokenizer.finish()]


TEXTS = [
    "The quick brown fox",
    "日本語の漢字 and ñandú",
    "family: 👩‍👩‍👧 flag 🇩🇪 😀😀",
    "  two  spaces\n\n\tand a tab ",
    "line one.\nline two, the end.",
]


@pytest.mark.parametrize("name", ["byte_level", "llama", "gemma", "t5", "hidden_bytes"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_in_whole_characters(tokenizers: dict[str, Counting], name: str, text: str) -> None:
    tokenizer = tokenizers[name]
    whole = tokenizer.encode_prompt("fox" + text)
    start = len(tokenizer.encode_prompt("fox"))
    for cut in (0, 1, start, len(whole) // 2):
        before = tokenizer.decode(whole[:cut], True)
        if "\ufffd" in before:
            continue
        out = pieces(tokenizer, whole[:cut], whole[cut:])
        assert before + "".join(out) == tokenizer.decode(whole, True)
        assert not any("\ufffd" in piece for piece in out)
        assert out[-1] == "", "nothing was held back for longer than its character"


def test_a_character_comes_with_its_last_byte(tokenizers: dict[str, Counting]) -> None:
    fallback = ["<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>"]
    for name in ("llama", "gemma", "t5"):
        out = pieces(tokenizers[name], [], ids(tokenizers[name], "x", *fallback, "▁the"))
        assert out == ["x", "", "", "", "🦊", " the", ""]
    tokenizer = tokenizers["byte_level"]
    assert pieces(tokenizer, [], ids(tokenizer, "ð", "Ł", "¦", "Ĭ", "Ġ"))[:5] == ["", "", "", "🦊", " "]


def test_the_leading_space_stays_behind_a_prompt_only(tokenizers: dict[str, Counting]) -> None:
    for name, at_start in (("llama", "the"), ("t5", "the"), ("gemma", " the")):
        tokenizer = tokenizers[name]
        bos, the, word, tool = ids(tokenizer, "<s>", "▁the", "fo", "<tool>")
        assert pieces(tokenizer, [bos, word], [the, the]) == [" the", " the", ""]
        assert pieces(tokenizer, [bos], [the, the]) == [at_start, " the", ""]
        assert pieces(tokenizer, [], [the, the]) == [at_start, " the", ""]
        assert pieces(tokenizer, [bos, word, bos, bos], [the])[0] == " the"
        assert pieces(tokenizer, [bos, tool], [the])[0] == " the"
        assert pieces(tokenizer, [bos], [the], skip=False)[0] == " the"


def test_special_tokens_are_left_out_or_shown(tokenizers: dict[str, Counting]) -> None:
    for tokenizer, the in ((tokenizers["llama"], "▁the"), (tokenizers["byte_level"], "Ġfox")):
        word, end = ids(tokenizer, the, "</s>")
        assert "".join(pieces(tokenizer, [word], [word, end, word])) == tokenizer.token_text(word) * 2
        shown = "".join(pieces(tokenizer, [word], [word, end, word], skip=False))
        assert shown == f"{tokenizer.token_text(word)}</s>{tokenizer.token_text(word)}"


def test_a_skipped_token_does_not_break_a_character(tokenizers: dict[str, Counting]) -> None:
    tokenizer = tokenizers["llama"]
    generated = ids(tokenizer, "<0xC3>", "</s>", "<0xA9>")
    assert pieces(tokenizer, [], generated) == ["", "", "é", ""]
    assert "".join(pieces(tokenizer, [], generated, skip=False)) == "\ufffd</s>\ufffd"


def test_bytes_that_are_no_text_never_stall_the_stream(tokenizers: dict[str, Counting]) -> None:
    for name, byte in (("llama", "<0xFF>"), ("byte_level", "ÿ"), ("hidden_bytes", "ÿ")):
        tokenizer = tokenizers[name]
        out = pieces(tokenizer, [], ids(tokenizer, byte) * 100)
        assert "".join(out) == "\ufffd" * 100
        waiting = [len("".join(out[: n + 1])) for n in range(100)]
        assert all(n + 1 - given <= 4 for n, given in enumerate(waiting))


def test_an_unfinished_character_comes_at_the_end(tokenizers: dict[str, Counting]) -> None:
    for name, first in (("llama", "<0xF0>"), ("byte_level", "ð"), ("hidden_bytes", "ð")):
        tokenizer = tokenizers[name]
        assert pieces(tokenizer, [], ids(tokenizer, first)) == ["", "\ufffd"]


def test_tokens_may_come_in_bunches_and_unknown_ones_are_passed_over(tokenizers: dict[str, Counting]) -> None:
    tokenizer = tokenizers["llama"]
    the, fox = ids(tokenizer, "▁the", "▁fox")
    detokenizer = IncrementalDetokenizer(tokenizer, [the, 100_000], True)
    assert detokenizer.push([the, 100_000, fox]) == " the fox"
    assert detokenizer.push([]) == ""


@pytest.mark.parametrize("name", list(BUILDERS))
def test_the_cost_of_a_token_does_not_grow(tokenizers: dict[str, Counting], name: str) -> None:
    tokenizer = tokenizers[name]
    prompt = [i % 250 for i in range(5000)]
    generated = [(i * 7919) % 270 for i in range(5000)]
    tokenizer.decoded = 0
    pieces(tokenizer, prompt, generated)
    assert tokenizer.decoded <= 12 * len(generated)
    if name == "byte_level":
        assert tokenizer.decoded == 0


@pytest.mark.parametrize("name", list(BUILDERS))
def test_any_tokens_any_cut(tokenizers: dict[str, Counting], name: str) -> None:
    """The pieces are the whole decoded at once, wherever that is well defined."""
    tokenizer = tokenizers[name]
    known = [i for i in range(1000) if tokenizer.token(i)]
    spicy = [i for i in known if tokenizer.token(i) in {"▁", "▁▁", "<s>", "<0x20>", "<0xC3>", "<0xA9>", "Ã", "©", "Ġ"}]
    token_ids = st.lists(st.sampled_from(known) | st.sampled_from(spicy or known), max_size=12)

    @settings(max_examples=150, deadline=None)
    @given(token_ids, token_ids, st.booleans())
    def check(prompt: list[int], generated: list[int], skip: bool) -> None:
        out = pieces(tokenizer, prompt, generated, skip)
        before = tokenizer.decode(prompt, skip)
        whole = tokenizer.decode(prompt + generated, skip)
        if name == "byte_level":
            assert "".join(out) == tokenizer.decode(generated, skip)
        if "\ufffd" not in whole:
            if whole.startswith(before):
                assert before + "".join(out) == whole
            if "\ufffd" not in before:
                assert not any("\ufffd" in piece for piece in out)

    check()


def test_word_pieces(tokenizers: dict[str, Counting]) -> None:
    tokenizer = tokenizers["word_piece"]
    fox, es, stop = ids(tokenizer, "fox", "##es", ".")
    assert pieces(tokenizer, [], [fox, es, stop, fox]) == ["fox", "es", ".", " fox", ""]
    assert pieces(tokenizer, [fox], [fox]) == [" fox", ""]
