"""The terminal: tables that are filled anew every few seconds."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import ClassVar

from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widgets import DataTable, Footer, Sparkline, Static

from loramux_worker.top.change import Change
from loramux_worker.top.snapshot import Snapshot, read
from loramux_worker.top.tables import (
    ADAPTERS,
    OUTCOMES,
    TIERS,
    WORKERS,
    Row,
    Watched,
    busiest,
    changes,
    outcome_rows,
    slowest,
    tier_rows,
    tokens_per_second,
    worker_rows,
)

WINDOW = 10.0  # seconds over which rates are taken
_LIMIT = 12  # adapters in a table
_HISTORY = 240  # points of the line of tokens


class Top(App[None]):
    """Reads every page each `every` seconds. A worker that is away shows so, and is asked again."""

    TITLE = "loramux top"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        ("q", "quit", "quit"),
        ("p", "pause", "pause"),
        Binding("ctrl+c", "quit", show=False, priority=True),
    ]
    CSS = """
    #said { height: 1; padding: 0 1; text-style: bold; }
    #tokens { height: 3; margin: 0 1; }
    DataTable { border: round $primary; height: auto; max-height: 16; overflow-x: auto; }
    Horizontal { height: auto; }
    Horizontal DataTable { width: 1fr; }
    """

    def __init__(self, urls: Sequence[str], every: float) -> None:
        super().__init__()
        self._urls = tuple(urls)
        self._every = every
        self._seen: dict[str, deque[Snapshot]] = {url: deque() for url in urls}
        self._tokens: deque[float] = deque(maxlen=_HISTORY)
        self._paused = False

    def compose(self) -> ComposeResult:
        """The parts, from top to bottom."""
        yield Static(id="said")
        yield Sparkline(id="tokens")
        yield _table("workers", WORKERS)
        with Horizontal():
            yield _table("tiers", TIERS)
            yield _table("outcomes", OUTCOMES)
        with Horizontal():
            yield _table("busiest", ADAPTERS)
            yield _table("slowest", ADAPTERS)
        yield Footer()

    def on_mount(self) -> None:
        """Begin to look."""
        self._keep_looking()

    def action_pause(self) -> None:
        """Stop looking, or go on."""
        self._paused = not self._paused
        self._say()

    @work
    async def _keep_looking(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(self._every)

    async def look(self) -> None:
        """Read every page and fill the tables, unless paused."""
        if self._paused:
            return
        watched = await asyncio.gather(*map(self._watch, self._urls))
        together = changes(watched)
        self._fill("workers", worker_rows(watched))
        self._fill("tiers", tier_rows(together))
        self._fill("outcomes", outcome_rows(together))
        self._fill("busiest", busiest(together, _LIMIT))
        self._fill("slowest", slowest(together, _LIMIT))
        self._tokens.append(tokens_per_second(together))
        self.query_one("#tokens", Sparkline).data = list(self._tokens)
        self._say()

    async def _watch(self, url: str) -> Watched:
        seen = self._seen[url]
        try:
            seen.append(await asyncio.to_thread(read, url, max(1.0, self._every)))
        except ConnectionError as error:
            seen.clear()
            return Watched(url, trouble=str(error))
        while len(seen) > 2 and seen[-1].at - seen[1].at >= WINDOW:
            seen.popleft()
        return Watched(url, Change(seen[0] if len(seen) > 1 else None, seen[-1]))

    def _say(self) -> None:
        now = f"{self._tokens[-1]:,.0f} tokens/s" if self._tokens else ""
        pages = "1 worker" if len(self._urls) == 1 else f"{len(self._urls)} workers"
        state = "paused" if self._paused else f"every {self._every:g} s, rates over {WINDOW:g} s"
        self.query_one("#said", Static).update(f"loramux top · {pages} · {state} · {now}")

    def _fill(self, name: str, rows: Sequence[Row]) -> None:
        table = self.query_one(f"#{name}", DataTable)
        table.clear()
        table.add_rows(rows)


def _table(name: str, columns: Row) -> DataTable[str]:
    table: DataTable[str] = DataTable(id=name, cursor_type="none", zebra_stripes=True)
    table.border_title = name
    table.add_columns(*columns)
    return table
