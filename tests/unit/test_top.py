"""`loramux top` on pages that the worker's own metrics write, served on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import generate_latest
from textual.widgets import DataTable, Static

from loramux_schemas import ErrorCode, Timing
from loramux_worker.cli.top import top
from loramux_worker.errors import ConfigurationError
from loramux_worker.metrics import Metrics
from loramux_worker.top.change import Change, mean, quantile, rate, rates
from loramux_worker.top.screen import Top
from loramux_worker.top.snapshot import Snapshot, metrics_url, parse, read


class Page:
    """A worker's `/metrics` as a test wants it; `text` None: it answers 503; `hang` cleared: not before it is set."""

    def __init__(self) -> None:
        self.text: str | None = ""
        self.hang = threading.Event()
        self.hang.set()
        page = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page.hang.wait(10)
                self.send_response(503 if page.text is None else 200)
                self.end_headers()
                self.wfile.write((page.text or "").encode())

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/metrics"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def pages() -> Iterator[list[Page]]:
    made = [Page(), Page()]
    yield made
    for page in made:
        page.close()


def page_of(metrics: Metrics, **gauges: float) -> str:
    """What `/metrics` says, with gauges that parts of a running worker add."""
    lines = [f"loramux_{name} {value}" for name, value in {"ready": 1.0, **gauges}.items()]
    return generate_latest(metrics.registry).decode() + "\n".join(lines) + "\n"


def answer(metrics: Metrics, adapter_id: str, *, times: int, total_ms: float, tokens: int = 10) -> None:
    for _ in range(times):
        metrics.answered(
            adapter_id, 5, tokens, Timing(prefill_ms=total_ms / 2, decode_ms=total_ms / 2, total_ms=total_ms)
        )


def two_moments(act) -> list[Change]:
    """What changed in 10 seconds in which `act` happened to a worker's metrics."""
    metrics = Metrics()
    answer(metrics, "before", times=3, total_ms=9000)
    old = parse(page_of(metrics), 100.0)
    act(metrics)
    return [Change(old, parse(page_of(metrics), 110.0))]


def test_rates_and_means_are_of_what_came_between_the_pages() -> None:
    def act(metrics: Metrics) -> None:
        answer(metrics, "quick", times=40, total_ms=50, tokens=8)
        answer(metrics, "slow", times=10, total_ms=4000)
        metrics.failed("slow", ErrorCode.INTERNAL)

    changes = two_moments(act)
    assert rates(changes, "requests_total", "adapter") == {"before": 0.0, "quick": 4.0, "slow": pytest.approx(1.1)}
    assert rate(changes, "tokens_total", kind="generated") == pytest.approx((40 * 8 + 10 * 10) / 10)
    assert mean(changes, "adapter_request_seconds", adapter="slow") == pytest.approx(4.0)
    assert mean(changes, "adapter_request_seconds", adapter="before") is None


def test_a_quantile_lies_in_the_bucket_of_its_observation() -> None:
    def act(metrics: Metrics) -> None:
        answer(metrics, "quick", times=90, total_ms=40)
        answer(metrics, "slow", times=10, total_ms=4000)

    changes = two_moments(act)
    # 90 % of the requests are in (0.025, 0.05], the rest in (2.5, 5]
    assert quantile(changes, "request_total_seconds", 0.45) == pytest.approx(0.0375)
    assert quantile(changes, "request_total_seconds", 0.95) == pytest.approx(3.75)
    assert quantile(two_moments(lambda metrics: None), "request_total_seconds", 0.5) is None


def test_a_counter_that_begins_anew_counts_from_0() -> None:
    def snapshot(at: float, count: int) -> Snapshot:
        metrics = Metrics()
        answer(metrics, "a", times=count, total_ms=1)
        return parse(page_of(metrics), at)

    assert rate([Change(snapshot(0.0, 100), snapshot(10.0, 20))], "requests_total") == pytest.approx(2.0)
    assert rate([Change(None, snapshot(10.0, 20))], "requests_total") == 0.0


@pytest.mark.parametrize(
    ("said", "url"),
    [
        ("127.0.0.1:9400", "http://127.0.0.1:9400/metrics"),
        ("http://host:1/", "http://host:1/metrics"),
        ("https://host/workers/1/metrics", "https://host/workers/1/metrics"),
        ("[::1]:9400", "http://[::1]:9400/metrics"),
    ],
)
def test_an_address_may_be_short(said: str, url: str) -> None:
    assert metrics_url(said) == url


@pytest.mark.parametrize("said", ["file:///etc/passwd", "http://", "host:port", "ftp://host/"])
def test_what_is_no_address_is_refused(said: str) -> None:
    with pytest.raises(ConfigurationError, match="host:port"):
        metrics_url(said)


def test_what_is_no_worker_is_said(pages: list[Page]) -> None:
    for text, reason in (
        ("hello", "no page of metrics"),
        ("other_metric 1\n", "no metrics of a loramux worker"),
        (None, "HTTP 503"),
    ):
        pages[0].text = text
        with pytest.raises(ConnectionError, match=reason):
            read(pages[0].url, 1.0)
    with pytest.raises(ConnectionError, match="refused"):
        read("http://127.0.0.1:1/metrics", 1.0)


def cells(app: Top, name: str) -> dict[str, list[str]]:
    """The rows of a table by their first column."""
    table = app.query_one(f"#{name}", DataTable)
    rows = [[str(cell) for cell in table.get_row_at(i)] for i in range(table.row_count)]
    return {first: rest for first, *rest in rows}


async def test_the_screen_follows_workers_that_come_and_go(pages: list[Page]) -> None:
    metrics = Metrics()
    answer(metrics, "acme/quick", times=5, total_ms=20)
    pages[0].text, pages[1].text = page_of(metrics, batch_sequences=7, batch_ranks=48, kafka_lag=12), None
    first, second = (page.url.split("/")[2] for page in pages)
    app = Top([page.url for page in pages], every=3600)
    async with app.run_test(size=(150, 50)) as pilot:

        async def look() -> None:
            await app.run_worker(app.look()).wait()

        await look()
        workers = cells(app, "workers")
        assert workers[first][0] == "ready"
        assert workers[second][0] == "away: HTTP 503"
        assert workers["together"][0] == "1 of 2 ready"
        answer(metrics, "acme/quick", times=50, total_ms=20)
        answer(metrics, "acme/slow", times=2, total_ms=7000)
        metrics.failed("acme/slow", ErrorCode.ADAPTER_INVALID)
        metrics.dead_letters.labels("unparseable").inc()
        pages[0].text = page_of(metrics, batch_sequences=7, batch_ranks=48, kafka_lag=12, draining_seconds=3)
        pages[1].text = page_of(Metrics(), ready=0.0)
        await look()
        workers = cells(app, "workers")
        assert workers[first][0] == "draining 3 s"
        assert workers[first][5:7] == ["12", "0"]
        assert "48" in workers[first]
        assert workers[second][0] == "not ready"
        busiest, slowest = cells(app, "busiest"), cells(app, "slowest")
        assert list(busiest) == ["acme/quick", "acme/slow"]
        assert list(slowest) == ["acme/slow", "acme/quick"]
        assert slowest["acme/slow"][2:] == ["7.0 s", "33%"]
        assert cells(app, "outcomes")["adapter_invalid"][1] == "1"
        assert cells(app, "outcomes")["dead letters"][1] == "1"
        await pilot.press("p")
        assert "paused" in str(app.query_one("#said", Static).content)
        pages[0].text = None
        await look()
        assert cells(app, "workers") == workers, "paused"
        await pilot.press("p")
        await look()
        assert cells(app, "workers")[first][0].startswith("away")
        await pilot.press("q")
    assert app.return_code == 0


async def test_a_worker_that_hangs_does_not_stop_the_others_from_being_shown(pages: list[Page]) -> None:
    pages[0].text = page_of(Metrics())
    pages[1].hang.clear()
    first, second = (page.url.split("/")[2] for page in pages)
    app = Top([page.url for page in pages], every=0.2)
    async with app.run_test() as pilot:
        while not (workers := cells(app, "workers")):
            await pilot.pause(0.05)
        assert workers[first][0] == "ready"
        assert workers[second][0] == "away: no answer within 1 s"
        pages[1].text = page_of(Metrics())
        pages[1].hang.set()
        while cells(app, "workers")[second][0] != "ready":
            await pilot.pause(0.05)
        await pilot.press("ctrl+c")
    assert app.return_code == 0


def test_top_wants_a_terminal_and_an_address() -> None:
    with pytest.raises(ConfigurationError, match="host:port"):
        top(["host:port"])
    with pytest.raises(ConfigurationError, match="terminal"):  # pytest's standard output is none
        top()
