"""From what became of a request to the records that say so."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace

import structlog

from loramux_schemas import (
    ErrorCode,
    FinishReason,
    InvalidRequest,
    Reply,
    ReplyRoute,
    Request,
    Timing,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from loramux_worker.engine.protocol import AdapterReference
from loramux_worker.errors import Poisonous, RequestFailed
from loramux_worker.generation import Generation
from loramux_worker.kafka.dead_letters import dead_letter
from loramux_worker.kafka.records import OutgoingRecord, Record
from loramux_worker.metrics import Metrics
from loramux_worker.text.tokenizer import Tokenizer

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Topics:
    """Where answers go, and where they may be asked to go (names or fnmatch patterns)."""

    replies: str
    stream: str
    dead_letters: str
    allowed_replies: tuple[str, ...] = ()

    def allows(self, topic: str) -> bool:
        """Whether a request may have its reply sent there; topics of Kafka's own and our dead letters: only by name."""
        if topic == self.replies or topic in self.allowed_replies:
            return True
        if topic.startswith("__") or topic == self.dead_letters:
            return False
        return any(fnmatch.fnmatchcase(topic, p) for p in self.allowed_replies)


@dataclass(frozen=True, slots=True)
class Answer:
    """A generation that ended well; the first `count` of its tokens belong to the answer, read by `tokenizer`."""

    generation: Generation
    count: int
    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    adapter: AdapterReference | None
    tokenizer: Tokenizer


class ReplyWriter:
    """Writes replies and dead letters, counts and logs them; `log_text`: with prompts and answers."""

    def __init__(self, worker: str, topics: Topics, metrics: Metrics, *, log_text: bool = False) -> None:
        self._worker = worker
        self._topics = topics
        self._metrics = metrics
        self._log_text = log_text

    def answered(self, request: Request, route: ReplyRoute, answer: Answer, timing: Timing) -> OutgoingRecord:
        """The reply with text."""
        adapter, generation = answer.adapter, answer.generation
        adapter_id = None if adapter is None else adapter.adapter_id
        self._metrics.answered(adapter_id, answer.num_prompt_tokens, answer.count, timing)
        log.info("request_answered", tokens=answer.count, finish_reason=answer.finish_reason, total_ms=timing.total_ms)
        self._say_text(request, answer.text)
        reply = Reply(
            request_id=request.request_id,
            adapter_id=adapter_id,
            revision=None if adapter is None else adapter.revision,
            generated_text=answer.text,
            token_ids=tuple(generation.token_ids[: answer.count]),
            finish_reason=answer.finish_reason,
            usage=Usage(prompt_tokens=answer.num_prompt_tokens, completion_tokens=answer.count),
            logprobs=None if request.parameters.logprobs is None else _logprobs(answer),
            timing=timing,
            worker=self._worker,
            metadata=request.metadata,
        )
        return self._record(route, reply)

    def failed(self, request: Request, route: ReplyRoute, error: RequestFailed, timing: Timing) -> OutgoingRecord:
        """The error reply to a request that could be read."""
        adapter_id = None if request.adapter is None else request.adapter.adapter_id
        self._metrics.failed(adapter_id, error.code)
        log.info("request_failed", code=error.code, reason=error.message)
        self._say_text(request, None)
        reply = Reply.failure(
            error.code,
            error.message,
            request_id=request.request_id,
            adapter_id=adapter_id,
            worker=self._worker,
            metadata=request.metadata,
            timing=timing,
        )
        return self._record(route, reply)

    def invalid(self, error: InvalidRequest, route: ReplyRoute, timing: Timing) -> OutgoingRecord:
        """The error reply to a request that breaks the contract."""
        self._metrics.failed(error.adapter_id, ErrorCode.INVALID_REQUEST)
        log.info(
            "request_failed",
            code=ErrorCode.INVALID_REQUEST,
            reason=error.message,
            request_id=error.request_id,
            adapter_id=error.adapter_id,
        )
        reply = Reply.failure(
            ErrorCode.INVALID_REQUEST,
            error.message,
            request_id=error.request_id,
            adapter_id=error.adapter_id,
            worker=self._worker,
            metadata=error.metadata,
            timing=timing,
        )
        return self._record(route, reply)

    def buried(self, record: Record, route: ReplyRoute, reason: str) -> tuple[OutgoingRecord, ...]:
        """The dead letter of what is no request, and an answer where a correlation header says who asked."""
        self._metrics.dead_letters.labels("unparseable").inc()
        log.warning("dead_letter", partition=record.partition, offset=record.offset, reason=reason)
        letter = dead_letter(record, self._topics.dead_letters, reason)
        if not route.has_correlation:
            return (letter,)
        reply = Reply.failure(ErrorCode.INVALID_REQUEST, reason, request_id=None, worker=self._worker)
        return (letter, self._record(route, reply))

    def poisonous(self, record: Record, error: Poisonous) -> OutgoingRecord:
        """The dead letter of a request that took engines down; it is answered too."""
        self._metrics.dead_letters.labels("poison").inc()
        log.error("dead_letter", partition=record.partition, offset=record.offset, reason=error.message)
        return dead_letter(record, self._topics.dead_letters, error.message)

    def readdressed(self, reply: OutgoingRecord, route: ReplyRoute) -> OutgoingRecord:
        """The same reply for whoever `route` leads to."""
        return replace(reply, topic=route.topic or self._topics.replies, headers=route.echo, partition=route.partition)

    def instead(self, record: Record, refused: OutgoingRecord, reason: str) -> OutgoingRecord:
        """What to send, on a default topic, in place of a record that the cluster does not take."""
        if refused.topic == self._topics.dead_letters:
            # where the whole message lies is said by what we added to its headers
            return replace(refused, key=None, value=None, headers=refused.headers[len(record.headers) :])
        whole = Reply.from_json(refused.value or b"{}")
        reply = Reply.failure(
            ErrorCode.INTERNAL if refused.topic == self._topics.replies else ErrorCode.INVALID_REQUEST,
            reason,
            request_id=whole.request_id,
            adapter_id=whole.adapter_id,
            worker=self._worker,
            timing=whole.timing,
        )
        return self._record(ReplyRoute.unrouted(record.headers), reply)

    def _say_text(self, request: Request, answer: str | None) -> None:
        if self._log_text:
            asked = request.prompt or request.messages or request.prompt_token_ids
            log.info("request_text", asked=asked, answered=answer)

    def _record(self, route: ReplyRoute, reply: Reply) -> OutgoingRecord:
        key = None if reply.request_id is None else reply.request_id.encode()
        return OutgoingRecord(route.topic or self._topics.replies, key, reply.to_json(), route.echo, route.partition)


def _logprobs(answer: Answer) -> tuple[TokenLogprob, ...]:
    text, generation = answer.tokenizer.token_text, answer.generation
    return tuple(
        TokenLogprob(
            id=token,
            text=text(token),
            logprob=logprobs.logprob,
            top=tuple(TopLogprob(id=i, text=text(i), logprob=value) for i, value in logprobs.top),
        )
        for token, logprobs in zip(generation.token_ids[: answer.count], generation.logprobs, strict=False)
        if logprobs is not None
    )
