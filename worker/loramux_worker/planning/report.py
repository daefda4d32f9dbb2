"""The plan as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from loramux_worker.planning.costs import GB
from loramux_worker.planning.sizing import Fleet, Load, Plan
from loramux_worker.planning.tiers import TIERS


def show(found: Plan, load: Load, fleet: Fleet, console: Console) -> None:
    """Print it: how many, how much of each tier, what requests find and what they wait for."""
    console.print(
        f"[bold]{found.gpus} GPU{'s' if found.gpus > 1 else ''}[/], a worker each, {found.partitions} partitions, "
        f"{fleet.shards} an adapter. "
        f"The busiest worker has {_number(found.rate)} requests/s ({found.imbalance:.2f} × the mean), "
        f"{found.rate / found.most_rate:.0%} of the {_number(found.most_rate)} that it could take.",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("tier", "room of a worker", "setting", "adapters found there", box=None, pad_edge=False)
    room = (found.room.gpu, found.room.host, found.room.disk, found.store_bytes)
    settings = ("--adapter-memory", "--host-memory", "--disk-quota", "of all workers")
    for tier, num_bytes, setting, share in zip(TIERS, room, settings, found.found, strict=True):
        table.add_row(tier, f"{num_bytes / GB:.1f} GB", setting, f"{share:.1%}")
    table.add_row("KV cache", f"{found.kv_bytes / GB:.1f} GB", "--kv-cache-memory", "")
    console.print(table)
    batch, first = found.batch, found.first_token
    console.print(
        f"Steps: {batch.sequences:.1f} sequences and {batch.adapters:.1f} adapters at once. To the first token "
        f"{first.p50:.0f} ms (p50), {first.p99:.0f} ms (p99); between tokens {batch.step_ms:.1f} ms, "
        f"{batch.step_p99_ms:.1f} ms (p99); {first.mean / 1e3 + batch.step_ms * (load.requests.new - 1) / 1e3:.2f} s "
        f"for {load.requests.new} tokens. Kafka comes to it. Disk and store "
        f"are at {found.loads[0]:.0%} and {found.loads[1]:.0%} of what they can give.",
        highlight=False,
        soft_wrap=True,
    )


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"
