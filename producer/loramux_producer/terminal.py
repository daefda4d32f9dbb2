"""What the commands share: exit codes, one-line errors, and a client that is connected for the length of a block."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from enum import IntEnum
from typing import Final, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from loramux_producer.client import Client
from loramux_producer.errors import BatchError, ClientError, RequestTooLarge, Unanswered
from loramux_schemas import Reply, StreamDelta

CANCEL_SECONDS: Final = 3.0


class ExitCode(IntEnum):
    """What the shell is told."""

    OK = 0
    NO_ANSWER = 1
    USAGE = 2
    INTERRUPTED = 130


def fail(message: str, code: ExitCode) -> NoReturn:
    """Say on stderr why, and end the command."""
    typer.echo(f"loramux: {message}", err=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def exits() -> Iterator[None]:
    """Turn the errors of a command into one line and an exit code."""
    try:
        yield
    except (ValueError, RequestTooLarge) as error:
        fail(str(error), ExitCode.USAGE)
    except (ClientError, Unanswered) as error:
        fail(str(error), ExitCode.NO_ANSWER)
    except BatchError as error:
        fail(str(error), ExitCode.USAGE)
    except BrokenPipeError:
        raise  # typer ends quietly when nobody reads our output any more
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}", ExitCode.USAGE)
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None


@contextlib.asynccontextmanager
async def connected(client: Client) -> AsyncIterator[Client]:
    """The started client, closed at the end; where it cannot start, the command ends with exit code 2."""
    # What aiokafka logs, the client's errors say too: with a handler it does not write to the terminal.
    silence = logging.NullHandler()
    logging.getLogger("aiokafka").addHandler(silence)
    try:
        try:
            await client.start()
        except ClientError as error:
            fail(str(error), ExitCode.USAGE)
        try:
            yield client
        finally:
            await client.close()
    finally:
        logging.getLogger("aiokafka").removeHandler(silence)


@contextlib.asynccontextmanager
async def cancelling(client: Client, request_id: str) -> AsyncIterator[None]:
    """Whoever interrupts the block has the request stopped, too."""
    try:
        yield
    except asyncio.CancelledError:
        try:
            async with asyncio.timeout(CANCEL_SECONDS):
                await client.cancel(request_id)
        except TimeoutError:
            typer.echo(f"loramux: request {request_id} may go on: Kafka did not take its cancellation", err=True)
        except ClientError as error:
            typer.echo(f"loramux: request {request_id} may go on: {error}", err=True)
        raise


class TextPrinter:
    """Prints the text of answers to stdout. Errors are for stderr, where the command reports them."""

    def reply(self, reply: Reply) -> None:
        """A whole answer, as a line of its own."""
        print(reply.generated_text)

    def delta(self, delta: StreamDelta) -> None:
        """A piece of an answer."""
        print(delta.text, end="", flush=True)

    def end_of_deltas(self, reply: Reply) -> None:
        """The answer whose pieces have been printed is complete."""
        print()

    def failure(self, reply: Reply) -> None:
        """An error reply."""


class JsonPrinter:
    """Prints every message to stdout as one line of JSON."""

    def reply(self, reply: Reply | StreamDelta) -> None:
        """The message as it was on the wire."""
        print(reply.to_json().decode(), flush=True)

    delta = end_of_deltas = failure = reply


Printer = TextPrinter | JsonPrinter


@contextlib.contextmanager
def progress_bar(total: int, completed: int) -> Iterator[Callable[[Reply], None]]:
    """A bar on stderr, if that is a terminal; give the function in it every reply."""
    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[errors]} errors"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("batch", total=total, completed=completed, errors=0)
        errors = 0

        def on_answer(reply: Reply) -> None:
            nonlocal errors
            errors += reply.error is not None
            progress.update(task, advance=1, errors=errors)

        yield on_answer
