from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_worker.text.stop_strings import StopStrings


def run(stops: tuple[str, ...], pieces: list[str]) -> tuple[list[str], str | None]:
    strings = StopStrings(stops)
    given_out = [strings.push(piece) for piece in pieces]
    given_out.append(strings.finish())
    return given_out, strings.matched


def naive(stops: tuple[str, ...], text: str) -> tuple[str, str | None]:
    """Look at ever longer beginnings of the text; of the stop strings at the end of one the longest counts."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


def test_without_stop_strings_everything_passes_at_once() -> None:
    assert run((), ["a", "", "b"]) == (["a", "", "b", ""], None)


def test_a_stop_string_over_three_pieces() -> None:
    assert run(("STOP",), ["one S", "TO", "P two"]) == (["one ", "", "", ""], "STOP")


def test_a_false_alarm_is_given_out() -> None:
    assert run(("STOP",), ["ST", "OR", "E"]) == (["", "STOR", "E", ""], None)
    assert run(("aab",), ["a", "a", "a", "b"]) == (["", "", "a", "", ""], "aab")


def test_the_rest_comes_at_the_end() -> None:
    assert run(("\n\n",), ["line\n"]) == (["line", "\n"], None)


def test_nothing_comes_after_a_match() -> None:
    strings = StopStrings(("x",))
    assert strings.push("axb") == "a"
    assert (strings.push("more"), strings.finish(), strings.matched) == ("", "", "x")


def test_the_first_to_be_complete_wins_then_the_longest() -> None:
    assert run(("abcd", "bc"), ["abcd"]) == (["a", ""], "bc")
    assert run(("abc", "bc", "c"), ["xabc"]) == (["x", ""], "abc")
    assert run(("ab", "abc"), ["abc"]) == (["", ""], "ab")


def test_only_what_could_begin_a_stop_string_is_held() -> None:
    strings = StopStrings(("END", "\nuser:"))
    assert strings.push("The EN") == "The "
    assert strings.push("D-less\nus") == ""
    assert strings.matched == "END"
    strings = StopStrings(("END", "\nuser:"))
    assert strings.push("text\nus") == "text"
    assert strings.push("ers ") == "\nusers "


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(("a", ""))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_cut_gives_what_a_naive_search_gives(data: st.DataObject) -> None:
    letters = data.draw(st.sampled_from(["ab", "abc", "a😀é"]))
    text = data.draw(st.text(alphabet=letters, max_size=24))
    stops = tuple(data.draw(st.lists(st.text(alphabet=letters, min_size=1, max_size=5), max_size=4)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    expected, stop = naive(stops, text)
    strings = StopStrings(stops)
    given_out = ""
    for seen, piece in zip([*cuts, len(text)], pieces, strict=True):
        given_out += strings.push(piece)
        if strings.matched is None:
            held = text[len(given_out) : seen]
            assert given_out + held == text[:seen], "given out in order, nothing lost"
            assert held == "" or any(s.startswith(held) for s in stops), "held back only for a reason"
        assert (strings.matched is not None) == (naive(stops, text[:seen])[1] is not None), "as soon as it is there"
    given_out += strings.finish()
    assert (given_out, strings.matched) == (expected, stop)
