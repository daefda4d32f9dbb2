"""The input of a batch and the asking, without Kafka."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
import pytest

from batch_client import FakeClient, Standing, failed, ok
from loramux_producer import ClientError
from loramux_producer import batch as batch_module
from loramux_producer.batch import Batch, BatchInput, parse_line
from loramux_producer.errors import InputError, Unanswered
from loramux_producer.journal import Journal
from loramux_schemas import ErrorCode, Reply, Request

DIGEST = "0" * 32


def write_input(folder: Path, requests: Iterable[dict[str, Any]]) -> Path:
    path = folder / "in.jsonl"
    path.write_bytes(b"".join(orjson.dumps(request) + b"\n" for request in requests))
    return path


async def run(source: Path, journal: Journal, client: FakeClient, **settings: Any) -> None:
    await Batch(client, journal, **settings).run(BatchInput.check(source))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "FIRST_PAUSE_SECONDS", 0.001)


# The input


def test_lines_take_everything_that_a_request_takes() -> None:
    request = parse_line(b'{"request_id":"r1","inputs":"x","parameters":{"max_tokens":3}}')
    assert (request.request_id, request.prompt, request.parameters.max_new_tokens) == ("r1", "x", 3)
    assert parse_line(b'{"prompt":"x","request_id":null}').request_id


def test_every_wrong_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [b'{"prompt":"x"}', b"", b"{", b"[1]", b'{"prompt":"x","temperature":1}', b'{"request_id":7,"prompt":"x"}']
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(InputError) as caught:
        BatchInput.check(path)
    reports = str(caught.value).splitlines()
    assert [report.split(": ")[0] for report in reports] == [f"{path}, line {n}" for n in (3, 4, 5, 6)]
    assert "temperature: unknown field" in reports[2]


def test_many_wrong_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"{\n" * 25)
    with pytest.raises(InputError) as caught:
        BatchInput.check(path)
    assert len(str(caught.value).splitlines()) == 11
    assert str(caught.value).endswith("… and 15 more")


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    path = write_input(tmp_path, [{"prompt": "a"}, {"prompt": "b"}])
    first = BatchInput.check(path)
    assert first.num_requests == 2
    assert BatchInput.check(path) == first
    path.write_bytes(path.read_bytes() + b'{"prompt":"c"}')
    assert BatchInput.check(path).digest != first.digest


# The asking


async def test_everything_is_asked_once_with_bounded_concurrency(tmp_path: Path) -> None:
    source = write_input(tmp_path, ({"request_id": f"r{i}", "prompt": "x"} for i in range(100)))
    client = FakeClient()
    client.hold.clear()
    with Journal(tmp_path / "j", DIGEST) as journal:
        running = asyncio.create_task(run(source, journal, client, concurrency=8))
        await client.full.wait()
        client.hold.set()
        await running
        assert [reply["request_id"] for reply in journal.replies()] == [f"r{i}" for i in range(100)]
    assert client.most == 8
    assert set(client.asked.values()) == {1}


async def test_only_what_is_unanswered_is_asked(tmp_path: Path) -> None:
    source = write_input(tmp_path, ({"request_id": f"r{i}", "prompt": "x"} for i in range(10)))
    client = FakeClient()
    with Journal(tmp_path / "j", DIGEST) as journal:
        for line in (1, 4, 10):
            journal.append(line, ok("from before"))
        await run(source, journal, client)
        assert len(journal) == 10
    assert set(client.asked) == {"r1", "r2", "r4", "r5", "r6", "r7", "r8"}


async def test_what_an_earlier_run_asked_is_recognised(tmp_path: Path) -> None:
    """Replies that came while nobody read are taken, and what is asked again is what was asked before."""
    source = write_input(tmp_path, ({"prompt": f"{i}"} for i in range(6)))
    first, second = FakeClient(), FakeClient()
    with Journal(tmp_path / "j", DIGEST) as journal:
        asked = dict(BatchInput.check(source).requests(journal.batch_id))
        journal.stand_at("replies", {0: 3, 1: 0})
    with Journal(tmp_path / "j", DIGEST) as journal:
        name = journal.batch_id

        def missed(line: object, reply: Reply | None) -> tuple[bytes, bytes]:
            return f"{name}/{line}".encode(), b"{" if reply is None else reply.to_json()

        second.missed = [
            missed(1, ok("came while away")),
            missed(1, ok("came while away, twice")),
            missed(2, failed("final", ErrorCode.ADAPTER_NOT_FOUND)),
            missed(3, failed("may pass")),
            missed(4, None),
            missed("x", ok("no line")),
            (b"another client's/5", ok("another's").to_json()),
            (b"", b""),
        ]
        await run(source, journal, second)
        replies = [reply["request_id"] for reply in journal.replies()]
        assert replies == ["came while away", "final", *(asked[line].request_id for line in (3, 4, 5, 6))]
    assert second.resumed_at == {0: 3, 1: 0}
    assert second.asked == {asked[line].request_id: 1 for line in (3, 4, 5, 6)}
    assert second.correlation_ids == {f"{name}/{line}".encode() for line in (3, 4, 5, 6)}
    with Journal(tmp_path / "j", DIGEST) as journal:
        assert journal.positions("replies") == second.reply_positions
        await run(source, journal, first)
    assert not first.asked


async def test_a_reply_that_comes_too_late_is_kept(tmp_path: Path) -> None:
    source = write_input(tmp_path, ({"request_id": f"r{i}", "prompt": "x"} for i in range(10)))
    lines = source.read_bytes().splitlines()
    lines[0] = b'{"request_id":"r0","prompt":"x","metadata":{"answer":"late"}}'
    source.write_bytes(b"\n".join(lines))
    client = FakeClient()
    with Journal(tmp_path / "j", DIGEST) as journal:

        def on_answer(reply: Reply) -> None:
            if len(journal) == 9:
                client.take_unclaimed(f"{journal.batch_id}/1".encode(), ok("r0").to_json())

        await run(source, journal, client, concurrency=2, on_answer=on_answer)
        assert len(journal) == 10


async def test_retryable_errors_are_asked_again_and_others_are_not(tmp_path: Path) -> None:
    answers = ["second time", "internal", "adapter_not_found", "adapter_unavailable", "ok", "large"]
    source = write_input(
        tmp_path, ({"request_id": answer, "prompt": "x", "metadata": {"answer": answer}} for answer in answers)
    )
    client = FakeClient()
    seen: list[Reply] = []
    with Journal(tmp_path / "j", DIGEST) as journal:
        await run(source, journal, client, retries=2, on_answer=seen.append)
        codes = [reply["error"] and reply["error"]["code"] for reply in journal.replies()]
        assert journal.num_errors == 4
    assert codes == [None, "internal", "adapter_not_found", "adapter_unavailable", None, "invalid_request"]
    assert [client.asked[answer] for answer in answers] == [2, 3, 1, 3, 1, 1]
    assert sorted(reply.request_id or "" for reply in seen) == sorted(answers)


async def test_no_retries_asks_once(tmp_path: Path) -> None:
    source = write_input(tmp_path, [{"request_id": "r", "prompt": "x", "metadata": {"answer": "internal"}}])
    client = FakeClient()
    with Journal(tmp_path / "j", DIGEST) as journal:
        await run(source, journal, client, retries=0)
        assert journal.num_errors == 1
    assert client.asked["r"] == 1


async def test_one_late_reply_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    requests = [{"request_id": f"r{i}", "prompt": "x", "metadata": {"answer": "ok"}} for i in range(20)]
    requests[3]["metadata"] = {"answer": "late"}
    source = write_input(tmp_path, requests)
    client = FakeClient()
    with Journal(tmp_path / "j", DIGEST) as journal:
        with pytest.raises(Unanswered, match=r"without a reply within 5 s: 1$"):
            await run(source, journal, client, concurrency=2, timeout=5)
        assert len(journal) == 19
        assert 4 not in journal


async def test_it_stops_when_nobody_answers(tmp_path: Path) -> None:
    source = write_input(tmp_path, ({"prompt": "x", "metadata": {"answer": "late"}} for _ in range(1000)))
    client = FakeClient()
    with Journal(tmp_path / "j", DIGEST) as journal, pytest.raises(Unanswered):
        await run(source, journal, client, concurrency=10)
    assert client.asked.total() <= 20


async def test_a_failing_client_ends_the_batch(tmp_path: Path) -> None:
    source = write_input(
        tmp_path, ({"prompt": "x", "metadata": {"answer": "broken" if i == 5 else "ok"}} for i in range(1000))
    )
    client = FakeClient()
    with Journal(tmp_path / "j", DIGEST) as journal:
        with pytest.raises(ClientError, match="reading ended"):
            await run(source, journal, client, concurrency=10)
        assert 0 < len(journal) < 1000
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_reply_that_came_before_the_interruption_is_kept(tmp_path: Path) -> None:
    """Ctrl-C between a reply's arrival and its task's turn must not make the next run ask again."""
    source = write_input(tmp_path, [{"request_id": "r", "prompt": "x"}])
    arrived: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    class OneReply(Standing):
        async def submit_request(self, request: Request, **_: object) -> asyncio.Future[Reply]:
            asking.set()
            return arrived

    asking = asyncio.Event()
    with Journal(tmp_path / "j", DIGEST) as journal:
        running = asyncio.create_task(run(source, journal, OneReply()))  # type: ignore[arg-type]
        await asking.wait()
        arrived.set_result(ok("r"))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert 1 in journal
