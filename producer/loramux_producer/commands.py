"""`loramux send`, `batch` and `cancel`, plain functions for a typer application.

Exit codes: 0 answered, 1 an error reply or no reply, 2 something that the caller must change, 130 Ctrl-C.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from loramux_producer import options
from loramux_producer.batch import Batch, BatchInput
from loramux_producer.client import Client
from loramux_producer.errors import ClientError, ReplyFailed, Unanswered
from loramux_producer.journal import Journal
from loramux_producer.requests import build_request
from loramux_producer.terminal import (
    ExitCode,
    JsonPrinter,
    Printer,
    TextPrinter,
    cancelling,
    connected,
    exits,
    fail,
    progress_bar,
)
from loramux_schemas import (
    CONTROL_TOPIC,
    REPLIES_TOPIC,
    REQUESTS_TOPIC,
    STREAM_TOPIC,
    Cancellation,
    KafkaConnection,
    Request,
)


@options.with_connection
def send(
    connection: KafkaConnection,
    prompt_argument: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The prompt; read from stdin if there is none.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt, as an option.")] = None,
    message: Annotated[
        list[str] | None,
        typer.Option("--message", "-m", help="A chat message in place of a prompt: `user: Hi`. Repeat."),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", help="Adapter id, or id@revision; none: the base model.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", "-n")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", help="Above 0: sample. Not given: greedy.")
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-P", metavar="KEY=VALUE", help="Any other field, as seed=7. Repeat."),
    ] = None,
    header: options.Header = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it is generated.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole reply as JSON.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the reply.")] = 60.0,
    requests_topic: options.RequestsTopic = REQUESTS_TOPIC,
    replies_topic: options.RepliesTopic = REPLIES_TOPIC,
    stream_topic: options.StreamTopic = STREAM_TOPIC,
    control_topic: options.ControlTopic = CONTROL_TOPIC,
) -> None:
    """Ask one request and print the answer; Ctrl-C cancels it."""
    with exits():
        fields: dict[str, Any] = {"adapter_id": adapter, "messages": options.chat_messages(message or [])}
        if max_new_tokens is not None:
            fields["max_new_tokens"] = max_new_tokens
        if temperature is not None:
            # Who names a temperature wants it to count; the contract's own default is greedy.
            fields.update(temperature=temperature, do_sample=temperature > 0)
        fields.update(options.other_fields(parameter or []))
        request = build_request(_prompt(prompt_argument, prompt, fields), **fields)
        client = Client(
            connection=connection,
            requests_topic=requests_topic,
            replies_topic=replies_topic,
            stream_topic=stream_topic,
            control_topic=control_topic,
            timeout=timeout,
            headers=options.record_headers(header or []),
        )
        answer = _streamed_answer if stream else _whole_answer
        asyncio.run(answer(client, request, JsonPrinter() if as_json else TextPrinter()))


@options.with_connection
def batch(
    connection: KafkaConnection,
    source: Annotated[Path, typer.Argument(metavar="IN.JSONL", help="One request a line; request_id optional.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.JSONL", help="The replies, in the order of the input.")],
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Requests at a time.")] = 256,
    retries: Annotated[int, typer.Option("--retries", min=0, help="How often a retryable error is asked again.")] = 3,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that one request may take.")] = 600.0,
    header: options.Header = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    requests_topic: options.RequestsTopic = REQUESTS_TOPIC,
    replies_topic: options.RepliesTopic = REPLIES_TOPIC,
) -> None:
    """Ask every request of a file; run again after an interruption, it asks only what is unanswered."""
    with exits():
        client = Client(
            connection=connection,
            requests_topic=requests_topic,
            replies_topic=replies_topic,
            timeout=timeout,
            headers=options.record_headers(header or []),
        )
        journal_path = output.with_name(f"{output.name}.partial")
        if output.exists() and not overwrite and not journal_path.exists():
            raise ValueError(f"{output} exists: remove it, or give --overwrite")
        requests = BatchInput.check(source)
        with Journal(journal_path, requests.digest) as journal:
            with progress_bar(requests.num_requests, len(journal)) as on_answer:
                work = Batch(
                    client,
                    journal,
                    concurrency=concurrency,
                    retries=retries,
                    timeout=timeout,
                    on_answer=on_answer,
                )
                _run(work, requests)
            journal.finish(output)
        if journal.num_errors:
            fail(f"{journal.num_errors} of {len(journal)} replies in {output} are errors", ExitCode.NO_ANSWER)


@options.with_connection
def cancel(
    connection: KafkaConnection,
    request_ids: Annotated[list[str], typer.Argument(metavar="REQUEST_ID...", help="Whose requests to stop.")],
    requests_topic: options.RequestsTopic = REQUESTS_TOPIC,
    replies_topic: options.RepliesTopic = REPLIES_TOPIC,
    control_topic: options.ControlTopic = CONTROL_TOPIC,
) -> None:
    """Have requests stopped, whoever asked them; what is answered already stays as it is."""
    with exits():
        client = Client(
            connection=connection,
            requests_topic=requests_topic,
            replies_topic=replies_topic,
            control_topic=control_topic,
        )
        asyncio.run(_cancel(client, request_ids))


def _prompt(argument: str | None, option: str | None, fields: dict[str, Any]) -> str | None:
    if argument is not None and option is not None:
        raise ValueError("prompt: given as an argument and with --prompt")
    if argument is None and option is None and not (fields["messages"] or fields.get("prompt_token_ids")):
        return options.prompt_from_stdin()
    return option if argument is None else argument


async def _cancel(client: Client, request_ids: list[str]) -> None:
    for request_id in request_ids:
        Cancellation.of(request_id)  # all or none: an id that is wrong is told before any is cancelled
    async with connected(client):
        await asyncio.gather(*map(client.cancel, request_ids))


async def _whole_answer(client: Client, request: Request, printer: Printer) -> None:
    async with connected(client), cancelling(client, request.request_id):
        try:
            printer.reply(await (await client.submit_request(request)))
        except ReplyFailed as failed:
            printer.failure(failed.reply)
            raise


async def _streamed_answer(client: Client, request: Request, printer: Printer) -> None:
    async with connected(client), cancelling(client, request.request_id):
        answer = client.stream_request(request)
        try:
            async for delta in answer:
                printer.delta(delta)
        except ReplyFailed as failed:
            printer.failure(failed.reply)
            raise
        assert answer.reply is not None
        printer.end_of_deltas(answer.reply)


def _run(work: Batch, requests: BatchInput) -> None:
    """Ask what is unanswered; where that ends too early, say how far it came."""
    journal = work.journal
    if len(journal) == requests.num_requests:
        return

    async def connect_and_run() -> None:
        async with connected(work.client):
            await work.run(requests)

    def run_again(reason: str, code: ExitCode) -> NoReturn:
        answered = f"{len(journal)} of {requests.num_requests} are answered"
        fail(f"{reason}: {answered}; run the same command again for the rest", code)

    try:
        asyncio.run(connect_and_run())
    except KeyboardInterrupt:
        run_again("interrupted", ExitCode.INTERRUPTED)
    except (ClientError, Unanswered) as error:
        run_again(str(error), ExitCode.NO_ANSWER)
