"""`loramux demo`: the whole way of a request on one machine, in under a minute."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loramux_worker.errors import ConfigurationError

if TYPE_CHECKING:
    from loramux_schemas import Reply

_PROMPT = "Where is my order 4821?"
_START_SECONDS = 120.0


def demo(
    prompt: Annotated[str, typer.Option(help="What to ask the base model and every adapter.")] = _PROMPT,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 64,
) -> None:
    """Start a broker, a worker and the demo model; ask every adapter the same; print who answers what."""
    from rich.console import Console

    from loramux_worker.kafka.embedded import EmbeddedBroker

    console = Console(stderr=True)
    folder = _demo_folder()
    adapter_ids = sorted(
        str(path.parent.relative_to(folder / "adapters")) for path in folder.glob("adapters/**/adapter_config.json")
    )
    began = time.monotonic()
    console.print("loramux demo: an embedded Kafka broker, one worker, one tiny model, no network, no GPU")
    with EmbeddedBroker() as broker:
        console.print(f"  broker   {broker.bootstrap_servers}")
        with _worker(broker.bootstrap_servers, folder) as worker:
            with console.status("starting the worker"):
                _wait_ready(worker)
            console.print(f"  worker   ready after {time.monotonic() - began:.1f} s")
            answers = asyncio.run(_ask(broker.bootstrap_servers, [None, *adapter_ids], prompt, max_new_tokens))
    _print(prompt, answers)  # on standard output, so that it can be piped


def _demo_folder() -> Path:
    """The model and its adapters: in the source tree, or in the installed package."""
    here = Path(__file__).resolve()
    for folder in (here.parents[3] / "deploy" / "demo", here.parents[1] / "demo"):
        if (folder / "model" / "config.json").is_file():
            return folder
    raise ConfigurationError("the demo model is not here: run the demo from a source tree, or install the wheel")


@contextmanager
def _worker(bootstrap_servers: str, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A worker process with its log in a file; drained at the end."""
    with tempfile.TemporaryDirectory(prefix="loramux-demo-") as scratch:
        log = Path(scratch) / "worker.log"
        flags = {
            "bootstrap-servers": bootstrap_servers,
            "model": folder / "model",
            "adapter-uri": f"file://{folder / 'adapters'}/{{adapter_id}}",
            "disk-cache": Path(scratch) / "adapters",
            "device": "cpu",
            "delivery": "at_least_once",  # the embedded broker has no real transactions
            "http-port": 0,
            "log-format": "json",
        }
        command = [sys.executable, "-m", "loramux_worker", "worker", "--create-topics"]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        with log.open("wb") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=sink)  # noqa: S603 - ourselves
        try:
            yield process, log
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _wait_ready(worker: tuple[subprocess.Popen[bytes], Path]) -> None:
    process, log = worker
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        if any(_event(line) == "worker_ready" for line in log.read_bytes().splitlines()):
            return
        time.sleep(0.1)
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    raise ConfigurationError(f"the demo's worker did not start: {' '.join(last)[:300]}")


def _event(line: bytes) -> str | None:
    try:
        return str(json.loads(line).get("event"))
    except ValueError:
        return None


async def _ask(
    servers: str, adapter_ids: list[str | None], prompt: str, max_new_tokens: int
) -> list[tuple[str | None, Reply]]:
    """The same prompt to everybody at once, so that they share the batch."""
    from loramux_producer import Client

    async with Client(servers) as client:
        replies = await asyncio.gather(
            *(
                client.generate(
                    messages=[{"role": "user", "content": prompt}], adapter_id=each, max_new_tokens=max_new_tokens
                )
                for each in adapter_ids
            )
        )
    return list(zip(adapter_ids, replies, strict=True))


def _print(prompt: str, answers: list[tuple[str | None, Reply]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"“{prompt}”", show_lines=True)
    for heading in ("adapter", "answer", "tokens", "ms"):
        table.add_column(heading, justify="right" if heading in ("tokens", "ms") else "left")
    for adapter_id, reply in answers:
        tokens = len(reply.token_ids or ())
        milliseconds = "" if reply.timing is None else f"{reply.timing.total_ms:.0f}"
        table.add_row(adapter_id or "(base model)", reply.generated_text, str(tokens), milliseconds)
    Console().print(table)
