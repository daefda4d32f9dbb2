"""The checker of `make chaos` sees what is wrong: otherwise its silence means nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.answer_book import AnswerBook
from chaos.checker import Verdict, check_replies, check_stream
from chaos.load import Ask
from loramux_schemas import ErrorCode, Reply, StreamDelta

BOOK = AnswerBook(Path(), Path(), {("q", "a"): (1, 2, 3, 4), ("q", "b"): (1, 5, 6, 7), ("q", None): (8, 9, 10, 11)})


def ask(max_new_tokens: int = 4) -> Ask:
    return Ask("r-1", "a", "q", max_new_tokens, True, 0)


def reply(*tokens: int, adapter_id: str | None = "a", text: str = "abcd") -> Reply:
    return Reply(request_id="r-1", adapter_id=adapter_id, token_ids=tokens, generated_text=text)


def delta(index: int, *tokens: int) -> StreamDelta:
    return StreamDelta(request_id="r-1", index=index, text="".join("?abcd"[t] for t in tokens), token_ids=tokens)


def judged(*replies: Reply, max_new_tokens: int = 4) -> Verdict:
    verdict = Verdict()
    check_replies(verdict, ask(max_new_tokens), list(replies), BOOK)
    return verdict


def test_the_right_reply_is_nothing_to_complain_about() -> None:
    verdict = judged(reply(1, 2, 3, 4))
    assert verdict.complaints("exactly_once") == []
    assert verdict.telling == 1
    assert judged(reply(1), max_new_tokens=1).telling == 0, "adapter b begins with the same token"


@pytest.mark.parametrize(
    ("replies", "delivery", "complaint"),
    [
        ((), "at_least_once", "1 lost"),
        ((reply(1, 2, 3, 4), reply(1, 2, 3, 4)), "exactly_once", "1 duplicate replies"),
        ((reply(1, 2, 3, 4), reply(1, 5, 6, 7)), "at_least_once", "1 duplicate replies"),
        ((reply(1, 5, 6, 7),), "at_least_once", "1 replies of a wrong adapter"),
        ((reply(8, 9, 10, 11),), "at_least_once", "1 replies of a wrong adapter"),
        ((reply(1, 2, 3, 4, adapter_id=None),), "at_least_once", "1 replies of a wrong adapter"),
        ((reply(1, 2, 3),), "at_least_once", "1 replies with wrong tokens"),
        ((Reply.failure(ErrorCode.INTERNAL, "?", request_id="r-1"),), "at_least_once", "1 errors"),
    ],
)
def test_what_is_wrong_is_complained_about(replies: tuple[Reply, ...], delivery: str, complaint: str) -> None:
    assert complaint in judged(*replies).complaints(delivery)


def test_the_same_answer_twice_is_allowed_at_least_once() -> None:
    verdict = judged(reply(1, 2, 3, 4), reply(1, 2, 3, 4))
    assert verdict.duplicates == 1
    assert verdict.complaints("at_least_once") == []


@pytest.mark.parametrize(
    ("deltas", "outcome"),
    [
        ([delta(0, 1, 2), delta(1, 3, 4)], {"streams_whole": 1}),
        ([delta(0, 1, 2), delta(0, 1, 2), delta(1, 3, 4)], {"streams_whole": 1, "streams_begun_anew": 1}),
        ([delta(0, 1, 2)], {"streams_short": 1}),
        ([], {"streams_short": 1}),
        ([delta(0, 1), delta(2, 3, 4)], {"streams_with_gap": 1}),
        ([delta(0, 1, 2), delta(0, 1, 3), delta(1, 3, 4)], {"streams_wrong": 1}),
        ([delta(0, 1, 2), delta(1, 4, 3)], {"streams_wrong": 1}),
    ],
)
def test_streams(deltas: list[StreamDelta], outcome: dict[str, int]) -> None:
    verdict = Verdict()
    check_stream(verdict, ask(), deltas, reply(1, 2, 3, 4))
    names = ("streams_whole", "streams_begun_anew", "streams_short", "streams_with_gap", "streams_wrong")
    assert {name: n for name in names if (n := getattr(verdict, name))} == outcome
    assert bool(verdict.complaints("at_least_once")) == ("streams_wrong" in outcome)
