"""The picture of `loramux top` in the README: workers of one group under load, on this machine.

    python tests/benchmarks/picture_top.py        writes tests/benchmarks/results/top.svg

The demo model, 60 tenants whose adapters are copies of the demo's, asked for by Zipf's law, answers of many lengths;
one name leads nowhere.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loramux_producer import Client, ReplyFailed
from loramux_worker.top.screen import Top
from services.kafka import KafkaCluster
from services.worker import WorkerProcess

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"
RESULT = Path(__file__).resolve().parent / "results" / "top.svg"
TENANTS, ASKING, ANSWERS, SIZE = 60, 24, 100, (136, 42)


def main() -> None:
    """Start everything, wait, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help="to look on once all is warm (default 12)")
    parser.add_argument("--workers", type=int, default=2, help="workers of the group (default 2)")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the picture goes")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two engines and all else on a small machine
    with tempfile.TemporaryDirectory(prefix="loramux-picture-") as folder, KafkaCluster() as kafka:
        names = copy_adapters(Path(folder))
        for topic in ("lora.requests", "lora.replies", "lora.stream", "lora.control", "lora.dead-letters"):
            kafka.create_topic(topic, partitions=8)
        uri = f"file://{folder}/{{adapter_id}}"
        flags = {"adapter_uri": uri, "adapter_memory": "2MiB", "host_memory": "4MiB", "kv_cache_memory": "8MiB"}
        with contextlib.ExitStack() as stack:
            workers = [
                WorkerProcess(kafka.bootstrap_servers, DEMO / "model", wait=False, **flags)
                for _ in range(options.workers)
            ]
            for worker in workers:
                stack.enter_context(worker)
            for worker in workers:
                worker.wait_ready()
            urls = [f"http://127.0.0.1:{worker.port}/metrics" for worker in workers]
            picture = asyncio.run(draw(kafka.bootstrap_servers, urls, names, options.seconds))
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)  # they would come from somewhere else
    options.out.write_text(picture)
    print(f"{options.out}: {len(picture) // 1024} KiB")


def copy_adapters(folder: Path) -> list[str]:
    """The demo's adapters for many tenants; their ids, the most wanted first."""
    originals = sorted(path.parent for path in DEMO.glob("adapters/**/adapter_config.json"))
    names = []
    for i, original in zip(range(TENANTS), itertools.cycle(originals)):
        names.append(f"tenant-{i:02d}/{original.name}")
        shutil.copytree(original, folder / names[-1])
    return names


async def draw(servers: str, urls: list[str], names: list[str], seconds: float) -> str:
    """Let many ask, look on for some seconds when so many have been answered, and return the screen as SVG."""
    app = Top(urls, every=1.0)
    async with Client(servers, timeout=600) as client:
        warm, answers = asyncio.Event(), itertools.count(1)

        def on_answer() -> None:
            if next(answers) >= ANSWERS:
                warm.set()

        asking = [asyncio.create_task(ask(client, names, random.Random(i), on_answer)) for i in range(ASKING)]
        await warm.wait()
        async with app.run_test(size=SIZE) as pilot:
            await pilot.pause(seconds)
            picture = app.export_screenshot(title="loramux top", simplify=True)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    return picture


async def ask(client: Client, names: list[str], chance: random.Random, on_answer: Callable[[], None]) -> None:
    """One client that waits for each answer before it asks again."""
    weights = [1 / rank for rank in range(1, len(names) + 1)]
    while True:
        (name,) = chance.choices([*names, "tenant-99/deleted"], [*weights, 0.1])
        with contextlib.suppress(ReplyFailed):
            await client.generate(
                messages=[{"role": "user", "content": "Where is my order 4821?"}],
                adapter_id=name,
                max_new_tokens=chance.randint(4, 60),
                ignore_eos=True,
            )
        on_answer()


if __name__ == "__main__":
    main()
