"""`make chaos`, or in tests/: `python -m chaos --help`."""

from __future__ import annotations

import json
import signal
import time
import warnings
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers.utils.logging import disable_progress_bar

from chaos.faults import KINDS
from chaos.report import Report
from chaos.run import Options, run, run_zombies
from chaos.scene import Scene
from services.install import ServiceMissing, kafka_libs, versitygw
from services.process import ServerFailed

console = Console(stderr=True, highlight=False)


class Delivery(StrEnum):
    """What the workers promise."""

    exactly_once = "exactly_once"
    at_least_once = "at_least_once"


def main(
    requests: Annotated[int, typer.Option(min=1, help="Requests, sent in bursts while faults strike.")] = 10_000,
    partitions: Annotated[int, typer.Option(min=1, help="Partitions of the requests topic.")] = 12,
    workers: Annotated[int, typer.Option(min=2, help="Workers at the start.")] = 3,
    faults: Annotated[int, typer.Option(min=0, help="Faults, one after the other.")] = 20,
    brokers: Annotated[int, typer.Option(min=1, help="Kafka brokers; 3 survive the loss of one.")] = 1,
    adapters: Annotated[int, typer.Option(min=2, help="Adapters in the S3 server.")] = 50,
    seed: Annotated[int | None, typer.Option(help="Requests, faults and their order follow from it.")] = None,
    delivery: Annotated[Delivery, typer.Option(help="What the workers promise.")] = Delivery.exactly_once,
    minutes_limit: Annotated[float, typer.Option(help="No fault strikes after that many minutes.")] = 8.0,
    kind: Annotated[list[str] | None, typer.Option(help="Only faults of this kind (repeat it for several).")] = None,
    zombie: Annotated[int, typer.Option(min=0, help="Instead: the zombie alone, so many times.")] = 0,
) -> None:
    """Do bad things to a running loramux and look whether every request is answered exactly once.

    Starts Apache Kafka, an S3 server with the adapters and workers on this machine; sends requests with known
    answers; kills, stops, hangs and fills; then reads all topics with read_committed. Standard output gets a
    table and, as its last line, one JSON document. Exit code 1: a promise was broken. Ctrl-C ends all that was started.
    """
    unknown = set(kind or ()) - {each.name for each in KINDS}
    if unknown:
        names = ", ".join(f"'{each.name}'" for each in KINDS)
        console.print(f"--kind {unknown.pop()!r}: there is no such fault; there are {names}", style="red")
        raise typer.Exit(2)
    options = Options(
        requests,
        partitions,
        workers,
        faults,
        brokers,
        adapters,
        int(time.time()) % 100_000 if seed is None else seed,
        delivery.value,
        minutes_limit,
        tuple(kind or ()),
    )
    warnings.simplefilter("ignore")  # of PEFT and transformers about each other
    disable_progress_bar()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for locate in (kafka_libs, versitygw):  # what is missing is told before anything is made
            locate()
        report = run_zombies(zombie, options, say) if zombie else _run_with_bar(options)
    except ServiceMissing as missing:
        console.print(str(missing), style="red")
        raise typer.Exit(2) from None
    except (ServerFailed, TimeoutError) as error:
        console.print(f"seed {options.seed}: {error}", style="red", markup=False)
        console.print("\n".join(getattr(error, "__notes__", [])), markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("chaos: interrupted, everything it started has ended")
        raise typer.Exit(130) from None
    raise typer.Exit(tell(report))


def tell(report: Report) -> int:
    """Print a report; the exit code."""
    for line in report.verdict.notes:
        console.print(f"  {line}", markup=False)
    print(f"\n### Chaos, seed {report.settings['seed']}, {report.settings['delivery']}\n")
    print(report.to_markdown())
    print("\n" + ("; ".join(report.complaints) or "Every promise was kept.") + "\n")
    print(json.dumps(report.to_json()))
    return 1 if report.complaints else 0


def say(line: str) -> None:
    """Progress, on standard error."""
    console.print(f"… {line}", markup=False)


def _run_with_bar(options: Options) -> Report:
    columns = (TextColumn("answered"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task: TaskID = progress.add_task("answered", total=options.requests)

        def watch(scene: Scene) -> None:
            scene.watch.on_reply = lambda: progress.update(task, completed=len(scene.watch.seen))

        return run(options, say, watch)


if __name__ == "__main__":
    typer.run(main)
