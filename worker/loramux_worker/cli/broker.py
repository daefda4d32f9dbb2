"""`loramux broker`: the embedded broker, for a person who develops."""

from __future__ import annotations

import signal
import threading
from typing import Annotated

import typer

from loramux_worker.kafka.embedded import EmbeddedBroker


def broker(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Loopback port; 0 takes a free one.")] = 9092,
) -> None:
    """Run a Kafka broker in this process until Ctrl-C, for development only.

    Its messages are gone when it ends, it keeps the last 5 MiB of each of a topic's 4 partitions, it serves
    one worker, and it has no transactions: run that worker with `--delivery at_least_once`.
    """
    asked_to_end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked_to_end.set())
    with EmbeddedBroker(port) as running:
        typer.echo(f"Kafka broker on {running.bootstrap_servers}, for development only. Ctrl-C ends it.")
        asked_to_end.wait()
