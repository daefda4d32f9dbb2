"""What an application can read when all is over, held against what was sent.

**Replies.** Every acknowledged request has exactly one final reply, with the tokens that Hugging Face PEFT says for
its prompt and adapter; not one reply more.

**Streams.** Deltas of one request lie in one partition, in order. A worker that dies or loses the partition leaves a
stream unfinished, and the worker that takes over begins it anew at index 0; deltas of a worker that did not know yet
that it was replaced may lie between. So a reader takes the first delta of each index and drops the others, as
`loramux_producer.Client` does. What must hold: all deltas of one index say the same, and in the order of the indices
they are the beginning of the reply. Deltas are sent beside the replies, not in their transaction: what was in the hands
of a process that was killed, or under way to a broker that was, may be missing, and the reader takes what comes after
the last delta before the gap from the reply.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from chaos.answer_book import AnswerBook
from chaos.load import Ask
from chaos.reading import read_all
from loramux_schemas import ErrorCode, Reply, StreamDelta


@dataclass
class Verdict:
    """Counts, and a line for each thing that is wrong."""

    sent: int = 0
    replies: int = 0
    lost: int = 0
    duplicates: int = 0
    unequal_duplicates: int = 0
    wrong_adapter: int = 0
    wrong_tokens: int = 0
    unasked: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    dead_letters: int = 0
    telling: int = 0
    streams_whole: int = 0
    streams_begun_anew: int = 0
    streams_short: int = 0
    streams_with_gap: int = 0
    streams_wrong: int = 0
    notes: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        """Remember a line for the person who looks into it; the first ones are enough."""
        if len(self.notes) < 40:
            self.notes.append(line)

    def complaints(self, delivery: str) -> list[str]:
        """Promises that were broken."""
        forbidden = {
            "lost": self.lost,
            "duplicate replies": self.duplicates if delivery == "exactly_once" else self.unequal_duplicates,
            "replies of a wrong adapter": self.wrong_adapter,
            "replies with wrong tokens": self.wrong_tokens,
            "replies that nobody asked for": self.unasked,
            "streams that contradict their reply": self.streams_wrong,
            "dead letters": self.dead_letters,
            # the store may be away for longer than an adapter may take
            "errors": sum(self.errors.values()) - self.errors.get(ErrorCode.ADAPTER_UNAVAILABLE, 0),
        }
        return [f"{count} {what}" for what, count in forbidden.items() if count]


def check(servers: str, topics: dict[str, str], asks: Iterable[Ask], book: AnswerBook) -> Verdict:
    """Read all topics from the beginning and judge."""
    verdict = Verdict()
    by_id = {ask.request_id: ask for ask in asks}
    verdict.sent = len(by_id)
    replies: dict[str, list[Reply]] = defaultdict(list)
    for message in read_all(servers, topics["replies_topic"]):
        reply = Reply.from_json(message.value())
        verdict.replies += 1
        replies[reply.request_id or ""].append(reply)
    for request_id in replies.keys() - by_id.keys():
        verdict.unasked += len(replies[request_id])
        verdict.note(f"nobody asked: {replies[request_id][0]}")
    for ask in by_id.values():
        check_replies(verdict, ask, replies.get(ask.request_id, []), book)
    deltas: dict[str, list[StreamDelta]] = defaultdict(list)
    for message in read_all(servers, topics["stream_topic"]):
        delta = StreamDelta.from_json(message.value())
        deltas[delta.request_id].append(delta)
    for ask in by_id.values():
        if ask.stream and (final := replies.get(ask.request_id)) and final[0].status == "ok":
            check_stream(verdict, ask, deltas[ask.request_id], final[0])
    for message in read_all(servers, topics["dead_letter_topic"]):
        verdict.dead_letters += 1
        verdict.note(f"dead letter: {message.headers()}")
    return verdict


def check_replies(verdict: Verdict, ask: Ask, replies: list[Reply], book: AnswerBook) -> None:
    """Judge what came for one request."""
    if not replies:
        verdict.lost += 1
        verdict.note(f"lost: {ask}")
        return
    if len(replies) > 1:
        verdict.duplicates += len(replies) - 1
        verdict.note(f"{len(replies)} replies to {ask.request_id} by {', '.join(str(r.worker) for r in replies)}")
        verdict.unequal_duplicates += len({(r.status, r.token_ids) for r in replies}) - 1
    right = book.right(ask.prompt, ask.adapter_id, ask.max_new_tokens)
    for reply in replies:
        if reply.error is not None:
            verdict.errors[reply.error.code] = verdict.errors.get(reply.error.code, 0) + 1
            verdict.note(f"error: {ask.request_id} {reply.error.code}: {reply.error.message}")
            continue
        tokens = tuple(reply.token_ids or ())
        sayers = book.who_says(ask.prompt, tokens, ask.max_new_tokens)
        if reply.adapter_id != ask.adapter_id or (tokens != right and sayers):
            verdict.wrong_adapter += 1
            verdict.note(f"wrong adapter: {ask} answered as {reply.adapter_id}, with the tokens of {sayers}")
        elif tokens != right:
            verdict.wrong_tokens += 1
            verdict.note(f"wrong tokens: {ask} answered {tokens}, right is {right}")
        verdict.telling += sayers == [ask.adapter_id]


def check_stream(verdict: Verdict, ask: Ask, deltas: list[StreamDelta], reply: Reply) -> None:
    """Judge the deltas of one request, in the order in which they lie in their partition."""
    first: dict[int, StreamDelta] = {}
    for delta in deltas:
        if first.setdefault(delta.index, delta) != delta:
            verdict.streams_wrong += 1
            verdict.note(f"stream {ask.request_id}: index {delta.index} says {first[delta.index]} and {delta}")
            return
    text, tokens = "", []
    for index in range(len(first)):
        if index not in first:
            break
        text += first[index].text
        tokens += first[index].token_ids
    final = list(reply.token_ids or ())
    if final[: len(tokens)] != tokens or not (reply.generated_text or "").startswith(text):
        verdict.streams_wrong += 1
        verdict.note(f"stream {ask.request_id}: {tokens} {text!r}, the reply {final} {reply.generated_text!r}")
        return
    verdict.streams_begun_anew += len(deltas) > len(first)
    if tokens == final:
        verdict.streams_whole += 1
    elif max(first, default=-1) >= len(first):
        verdict.streams_with_gap += 1
        verdict.note(f"stream {ask.request_id}: indices {sorted(first)}")
    else:
        verdict.streams_short += 1
