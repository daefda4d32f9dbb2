"""The way of one request through the front: from its record to the records that answer it.

Everything that can go wrong with a request ends here as its own error reply; nothing of it reaches another request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import structlog

from loramux_schemas import (
    AdapterName,
    ErrorCode,
    FinishReason,
    InvalidRequest,
    ReplyRoute,
    Request,
    UnparseableMessage,
)
from loramux_worker.adapters.catalog import AdapterCatalog
from loramux_worker.authorization import Authorization
from loramux_worker.cancellations import Cancellations
from loramux_worker.dedupe import Answered, Duplicates, Key
from loramux_worker.deltas import DeltaStream
from loramux_worker.engine.protocol import AdapterReference
from loramux_worker.errors import Poisonous, RequestFailed
from loramux_worker.generation import Generation
from loramux_worker.kafka.records import OutgoingRecord, Record
from loramux_worker.pool import EnginePool
from loramux_worker.prompts import fewest_tokens, prompt_token_ids, sampling_parameters
from loramux_worker.replies import Answer, ReplyWriter, Topics
from loramux_worker.stopwatch import Stopwatch
from loramux_worker.text.assembler import TextAssembler
from loramux_worker.text.detokenizer import IncrementalDetokenizer
from loramux_worker.text.tokenizer import Tokenizer
from loramux_worker.text.tokenizers import Tokenizers

log = structlog.get_logger(__name__)


class Answerer:
    """Turns records into answers; `post` sends deltas in order without waiting for each."""

    def __init__(
        self,
        *,
        topics: Topics,
        authorization: Authorization,
        tokenizers: Tokenizers,
        catalog: AdapterCatalog,
        pool: EnginePool,
        replies: ReplyWriter,
        post: Callable[[OutgoingRecord], Awaitable[None]],
        cancellations: Cancellations,
        duplicates: Duplicates,
    ) -> None:
        self._topics = topics
        self._authorization = authorization
        self._tokenizers = tokenizers
        self._catalog = catalog
        self._pool = pool
        self._replies = replies
        self._post = post
        self._cancellations = cancellations
        self._duplicates = duplicates

    async def __call__(self, record: Record, watch: Stopwatch) -> tuple[OutgoingRecord, ...]:
        """Answer one record, whose `watch` was started when it was taken. Raises nothing but `CancelledError`."""
        route = ReplyRoute.unrouted(record.headers)
        try:
            request = Request.from_json(record.value)
        except UnparseableMessage as error:
            return self._replies.buried(record, route, error.reason)
        except InvalidRequest as error:
            return (self._replies.invalid(error, route, watch.timing(None)),)
        adapter_id = None if request.adapter is None else request.adapter.adapter_id
        structlog.contextvars.bind_contextvars(request_id=request.request_id, adapter_id=adapter_id)
        try:
            route = self._route(record)
            self._authorization.check(record.headers, request.adapter)
        except RequestFailed as error:
            return (self._replies.failed(request, route, error, watch.timing(None)),)
        # What hangs on headers is decided above, for each message: an equal one may be somebody else's.
        letters: list[OutgoingRecord] = []
        reply = await self._duplicates.answer(
            Key.of(record), lambda: self._answer(record, request, route, watch, letters)
        )
        return (*letters, self._replies.readdressed(reply, route))

    async def _answer(
        self, record: Record, request: Request, route: ReplyRoute, watch: Stopwatch, letters: list[OutgoingRecord]
    ) -> Answered:
        """The reply; what engines died of is put into `letters` too."""
        try:
            with self._cancellations.scope(request.request_id):
                answer = await self._run(request, route, watch)
        except RequestFailed as error:
            failed = error
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a bug of ours, or a panic in Rust, must cost one request, not the worker
            log.exception("request_crashed")
            failed = RequestFailed(ErrorCode.INTERNAL, f"the worker failed: {type(error).__name__}")
        else:
            timing = watch.timing(answer.generation.timing)
            return Answered(self._replies.answered(request, route, answer, timing), is_final=True)
        reply = self._replies.failed(request, route, failed, watch.timing(None))
        if isinstance(failed, Poisonous):
            letters.append(self._replies.poisonous(record, failed))
            return Answered(reply, is_final=True)  # once is enough
        return Answered(reply, is_final=not failed.code.retryable)

    def _route(self, record: Record) -> ReplyRoute:
        try:
            route = ReplyRoute.from_headers(record.headers)
        except ValueError as error:
            raise RequestFailed(ErrorCode.INVALID_REQUEST, str(error)) from None
        # never back to where requests come from, whatever the patterns say
        if route.topic is not None and (route.topic == record.topic or not self._topics.allows(route.topic)):
            raise RequestFailed(ErrorCode.INVALID_REQUEST, f"reply_to: {route.topic} is not in --reply-topics")
        return route

    async def _run(self, request: Request, route: ReplyRoute, watch: Stopwatch) -> Answer:
        """Bring adapter, tokenizer and prompt together, and generate."""
        async with AsyncExitStack() as leases:
            try:
                async with asyncio.timeout(watch.seconds_until(request.deadline_ms)):
                    adapter = await self._acquire(request.adapter, leases)
                    tokenizer = await self._tokenizers.of(adapter)
                    prompt = await prompt_token_ids(request, tokenizer, self._pool.limits)
            except TimeoutError:
                raise RequestFailed(ErrorCode.DEADLINE_EXCEEDED, "the deadline passed before generation") from None
            watch.prepared()
            return await self._generate(request, route, prompt, adapter, tokenizer)

    async def _acquire(self, name: AdapterName | None, leases: AsyncExitStack) -> AdapterReference | None:
        """The adapter, on disk until `leases` ends; its weights begin their way into memory as soon as it is there."""
        if name is None:
            return None
        adapter = await self._catalog.acquire(name)
        leases.callback(self._catalog.release, adapter)
        self._pool.prefetch(adapter)
        structlog.contextvars.bind_contextvars(revision=adapter.revision)
        return adapter

    async def _generate(
        self,
        request: Request,
        route: ReplyRoute,
        prompt: list[int],
        adapter: AdapterReference | None,
        tokenizer: Tokenizer,
    ) -> Answer:
        parameters = request.parameters
        detokenizer = IncrementalDetokenizer(tokenizer, prompt, parameters.skip_special_tokens)
        assembler = TextAssembler(detokenizer, parameters.stop)
        generation = self._pool.submit(
            prompt,
            sampling_parameters(request, tokenizer.eos_token_ids),
            adapter,
            priority=request.priority,
            deadline=None if request.deadline_ms is None else request.deadline_ms / 1000,
            fewest_tokens=fewest_tokens(request),
        )
        try:
            count = await self._follow(request, route, generation, assembler)
        finally:
            self._pool.cancel(generation)
        text = assembler.text
        if parameters.return_full_text:
            text = (request.prompt or tokenizer.decode(prompt, True)) + text
        reason = FinishReason.STOP_SEQUENCE if assembler.stopped else FinishReason(generation.finish_reason or "")
        return Answer(generation, count, text, reason, len(prompt), adapter, tokenizer)

    async def _follow(
        self, request: Request, route: ReplyRoute, generation: Generation, assembler: TextAssembler
    ) -> int:
        """Read a generation to its end, sending deltas if asked; returns how many tokens belong to the answer."""
        stream = DeltaStream(request, route, self._topics.stream, self._post) if request.stream else None
        parameters = request.parameters
        # where nobody looks at the text before the end, one waking for all tokens will do
        at_once = stream is None and not parameters.stop
        count = 0
        while not (assembler.stopped or (generation.is_done and count == len(generation.token_ids))):
            await generation.wait_beyond(parameters.max_new_tokens if at_once else count)
            for token_id in generation.token_ids[count:]:
                count += 1
                last = generation.finish_reason is not None and count == len(generation.token_ids)
                hidden = last and generation.finish_reason != FinishReason.LENGTH and parameters.skip_special_tokens
                piece = "" if hidden else assembler.push(token_id)
                if stream is not None:
                    await stream.push(token_id, piece)
                if assembler.stopped:
                    break
        rest = assembler.finish()
        if stream is not None:
            await stream.finish(rest)
        return count
