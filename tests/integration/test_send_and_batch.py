"""The commands `send` and `batch`, as processes of their own, on a real Kafka."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from command_rig import Commands, Outcome, end
from loramux_schemas import Cancellation, Reply, Request, StreamDelta
from services.kafka import KafkaCluster

pytestmark = pytest.mark.kafka
SECONDS = 60.0


@pytest.fixture
async def commands(kafka: KafkaCluster, kafka_topics: Callable[..., str], tmp_path: Path) -> AsyncIterator[Commands]:
    names = kafka_topics("requests", partitions=4), kafka_topics("replies", partitions=2), kafka_topics("stream")
    commands = Commands(kafka.bootstrap_servers, *names, kafka_topics("control"), tmp_path)
    async with commands.responder:
        yield commands


async def test_send_prints_the_text(commands: Commands) -> None:
    as_argument, as_option, piped = await asyncio.gather(
        commands.run("send", "hello", "--adapter", "acme/support", "-P", "seed=7", "-P", 'stop=["\\n"]', "-t", "0.5"),
        commands.run("send", "--prompt", "hi", "-n", "3", "--stream"),
        commands.run("send", stdin="from a pipe\n"),
    )
    assert as_argument == Outcome(0, "acme/support answers hello\n", "")
    assert as_option == Outcome(0, "base answers hi\n", "")
    assert piped == Outcome(0, "base answers from a pipe\n", "")
    asked = {request.prompt: request for request in (Request.from_json(r.value) for r in commands.responder.records)}
    parameters = asked["hello"].parameters
    assert (parameters.seed, parameters.stop, parameters.temperature) == (7, ("\n",), 0.5)
    assert parameters.do_sample
    assert asked["hi"].parameters.max_new_tokens == 3
    assert asked["hi"].stream


async def test_send_prints_json(commands: Commands) -> None:
    plain, streamed, chat = await asyncio.gather(
        commands.run("send", "hello", "--json", "-P", "request_id=r1"),
        commands.run("send", "hello", "--json", "--stream", "-P", "request_id=r2"),
        commands.run("send", "-m", "system: be brief", "-m", "Hi: you", "--json"),
    )
    assert [outcome.code for outcome in (plain, streamed, chat)] == [0, 0, 0]
    assert Reply.from_json(plain.out.encode()).generated_text == "base answers hello"
    *deltas, reply = streamed.out.splitlines()
    assert "".join(StreamDelta.from_json(delta.encode()).text for delta in deltas) == "base answers hello"
    assert Reply.from_json(reply.encode()).request_id == "r2"
    requests = [Request.from_json(record.value) for record in commands.responder.records]
    messages = next(request.messages for request in requests if request.messages is not None)
    assert [(m.role, m.content) for m in messages] == [("system", "be brief"), ("user", "Hi: you")]


async def test_an_error_reply_is_one_line_and_exit_code_1(commands: Commands) -> None:
    wishes = 'metadata={"error":"adapter_not_found"}'
    plain, as_json, late = await asyncio.gather(
        commands.run("send", "x", "-P", wishes),
        commands.run("send", "x", "-P", wishes, "--json", "--stream"),
        commands.run("send", "x", "-P", 'metadata={"silent":true}', "-P", "request_id=r1", "--timeout", "0.5"),
    )
    assert plain == Outcome(1, "", "loramux: adapter_not_found: as asked\n")
    assert (as_json.code, as_json.err) == (1, plain.err)
    assert orjson.loads(as_json.out.splitlines()[-1])["error"]["code"] == "adapter_not_found"
    assert late == Outcome(1, "", "loramux: request r1: no reply within 0.5 s\n")


async def test_a_missing_topic_is_one_line_and_exit_code_2(commands: Commands) -> None:
    write_requests(commands.folder, 1)
    send, batch = await asyncio.gather(
        commands.run("send", "x", "--replies-topic", "absent"),
        commands.run("batch", "in.jsonl", "out.jsonl", "--requests-topic", "absent"),
    )
    for outcome in (send, batch):
        assert outcome.code == 2
        assert outcome.err.startswith("loramux: topic absent does not exist")
        assert outcome.err.count("\n") == 1
    assert {path.name for path in commands.folder.iterdir()} == {"in.jsonl"}


async def test_ctrl_c_cancels_what_was_sent(commands: Commands) -> None:
    silent = 'metadata={"silent":true}'
    whole = await commands.start("send", "x", "-P", silent, "-P", "request_id=whole")
    streamed = await commands.start("send", "x", "-P", silent, "-P", "request_id=streamed", "--stream")
    lost = await commands.start("send", "x", "-P", silent, "-P", "request_id=lost", "--control-topic", "absent")
    await asyncio.wait_for(commands.responder.wait_asked(3), SECONDS)
    for process in (whole, streamed, lost):
        process.send_signal(signal.SIGINT)
    assert await end(whole) == await end(streamed) == Outcome(130, "", "")
    outcome = await end(lost)
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.err.startswith("loramux: request lost may go on: topic absent does not exist")
    assert outcome.err.count("\n") == 1
    assert await cancelled(commands) == {"whole", "streamed"}


async def test_cancel_takes_many_ids_and_none_that_is_wrong(commands: Commands) -> None:
    assert await commands.run("cancel", "r1", "r2", "r3") == Outcome(0, "", "")
    wrong, absent = await asyncio.gather(
        commands.run("cancel", "r4", "x" * 300), commands.run("cancel", "r5", "--control-topic", "absent")
    )
    assert (wrong.code, wrong.out, wrong.err.count("\n")) == (2, "", 1)
    assert wrong.err.startswith("loramux: request_id: must have at most 256")
    assert (absent.code, absent.out) == (1, "")
    assert absent.err.startswith("loramux: topic absent does not exist")
    assert await cancelled(commands) == {"r1", "r2", "r3"}


async def cancelled(commands: Commands) -> set[str]:
    """Everything that is in the control topic, each keyed by its request."""
    place = TopicPartition(commands.control_topic, 0)
    async with AIOKafkaConsumer(bootstrap_servers=commands.servers, auto_offset_reset="earliest") as consumer:
        consumer.assign([place])
        records: list[Any] = []
        while len(records) < (await consumer.end_offsets([place]))[place]:
            records += (await consumer.getmany(timeout_ms=200)).get(place, [])
    ids = [Cancellation.from_json(record.value).request_id for record in records]
    assert [record.key.decode() for record in records] == ids
    return set(ids)


def write_requests(folder: Path, count: int, **wishes: Any) -> list[dict[str, Any]]:
    requests = [
        {"request_id": f"r{i}", "prompt": f"prompt {i}", "adapter_id": f"acme/{i % 5}", "metadata": wishes}
        for i in range(count)
    ]
    lines = [orjson.dumps(request) for request in requests]
    (folder / "in.jsonl").write_bytes(b"\n".join(lines))
    return requests


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


async def test_batch_keeps_the_order(commands: Commands) -> None:
    requests = write_requests(commands.folder, 300, copies=2)
    outcome = await commands.run("batch", "in.jsonl", "out.jsonl")
    assert outcome == Outcome(0, "", "")
    replies = read_lines(commands.folder / "out.jsonl")
    assert [reply["request_id"] for reply in replies] == [request["request_id"] for request in requests]
    assert [reply["generated_text"] for reply in replies] == [f"acme/{i % 5} answers prompt {i}" for i in range(300)]
    assert commands.responder.asked == {request["request_id"]: 1 for request in requests}
    assert {path.name for path in commands.folder.iterdir()} == {"in.jsonl", "out.jsonl"}


async def test_batch_retries_and_reports_errors(commands: Commands) -> None:
    lines = [
        {"request_id": "passing", "prompt": "x", "metadata": {"error": "internal", "times": 1}},
        {"request_id": "lasting", "prompt": "x", "metadata": {"error": "adapter_unavailable"}},
        {"request_id": "final", "prompt": "x", "metadata": {"error": "adapter_not_found"}},
        {"request_id": "large", "prompt": "x" * 2_000_000},
        {"prompt": "without an id"},
    ]
    (commands.folder / "in.jsonl").write_bytes(b"\n".join(map(orjson.dumps, lines)))
    outcome = await commands.run("batch", "in.jsonl", "out.jsonl", "--retries", "1")
    assert outcome == Outcome(1, "", "loramux: 3 of 5 replies in out.jsonl are errors\n")
    replies = read_lines(commands.folder / "out.jsonl")
    codes = [reply["error"] and reply["error"]["code"] for reply in replies]
    assert codes == [None, "adapter_unavailable", "adapter_not_found", "invalid_request", None]
    asked = commands.responder.asked
    assert (asked["passing"], asked["lasting"], asked["final"], asked["large"]) == (2, 2, 1, 0)
    assert len(replies[4]["request_id"]) == 36


@pytest.mark.parametrize("interruption", [signal.SIGINT, signal.SIGKILL])
async def test_an_interrupted_batch_asks_only_what_is_unanswered(
    commands: Commands, interruption: signal.Signals
) -> None:
    requests = write_requests(commands.folder, 200)
    journal = commands.folder / "out.jsonl.partial"
    commands.responder.limit = 70
    process = await commands.start("batch", "in.jsonl", "out.jsonl", "-c", "20")
    async with asyncio.timeout(SECONDS):
        while not journal.exists() or journal.read_bytes().count(b"\n") < 72:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)
    process.send_signal(interruption)
    outcome = await end(process)
    if interruption is signal.SIGINT:
        said = "loramux: interrupted: 70 of 200 are answered; run the same command again for the rest\n"
        assert outcome == Outcome(130, "", said)
    else:
        assert outcome.code == -interruption
    answered = {line["reply"]["request_id"] for line in read_lines(journal) if "reply" in line}
    assert len(answered) == 70
    assert not (commands.folder / "out.jsonl").exists()
    asked_before = Counter(commands.responder.asked)

    commands.responder.limit = float("inf")
    assert await commands.run("batch", "in.jsonl", "out.jsonl") == Outcome(0, "", "")
    asked_again = commands.responder.asked - asked_before
    assert set(asked_again) == {request["request_id"] for request in requests} - answered
    assert set(asked_again.values()) == {1}
    replies = read_lines(commands.folder / "out.jsonl")
    assert [reply["request_id"] for reply in replies] == [request["request_id"] for request in requests]
    assert all(reply["status"] == "ok" for reply in replies)
    assert not journal.exists()


async def test_a_batch_that_is_killed_at_random_moments_asks_nothing_twice(commands: Commands) -> None:
    """Replies that come while nobody reads are found in the topic; lines without an id keep the one they were given."""
    lines = [orjson.dumps({"prompt": f"prompt {i}", "adapter_id": f"acme/{i % 5}"}) for i in range(400)]
    (commands.folder / "in.jsonl").write_bytes(b"\n".join(lines))
    output = commands.folder / "out.jsonl"
    moments = random.Random(11)
    kills = 0
    while not output.exists():
        process = await commands.start("batch", "in.jsonl", "out.jsonl", "-c", "4")
        if kills < 4:
            asked = commands.responder.asked.total()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(commands.responder.wait_asked(asked + moments.randrange(1, 60)), SECONDS)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            kills += 1
        await end(process)
        await commands.responder.settle()
    replies = read_lines(output)
    assert [reply["generated_text"] for reply in replies] == [f"acme/{i % 5} answers prompt {i}" for i in range(400)]
    assert len({reply["request_id"] for reply in replies}) == 400
    assert commands.responder.asked == {reply["request_id"]: 1 for reply in replies}
    assert kills == 4


async def test_a_batch_without_answers_ends_and_goes_on_later(commands: Commands) -> None:
    write_requests(commands.folder, 10)
    commands.responder.limit = 4
    outcome = await commands.run("batch", "in.jsonl", "out.jsonl", "--timeout", "1")
    said = "requests without a reply within 1 s: 6: 4 of 10 are answered; run the same command again for the rest"
    assert outcome == Outcome(1, "", f"loramux: {said}\n")

    before = (commands.folder / "in.jsonl").read_bytes()
    (commands.folder / "in.jsonl").write_bytes(before + b'\n{"prompt":"one more"}')
    changed = await commands.run("batch", "in.jsonl", "out.jsonl")
    assert changed.code == 2
    assert "belongs to an input that has changed since" in changed.err
    assert changed.err.count("\n") == 1

    (commands.folder / "in.jsonl").write_bytes(before)
    commands.responder.limit = float("inf")
    assert (await commands.run("batch", "in.jsonl", "out.jsonl")).code == 0
    assert len(read_lines(commands.folder / "out.jsonl")) == 10


async def test_an_output_is_not_replaced_unasked(commands: Commands) -> None:
    write_requests(commands.folder, 3)
    assert (await commands.run("batch", "in.jsonl", "out.jsonl")).code == 0
    whole = (commands.folder / "out.jsonl").read_bytes()
    # It would pay for everything again.
    assert (await commands.run("batch", "in.jsonl", "out.jsonl")).code == 2
    again = await commands.run("batch", "in.jsonl", "out.jsonl", "--overwrite")
    assert again.code == 0
    assert (commands.folder / "out.jsonl").read_bytes() == whole
    assert set(commands.responder.asked.values()) == {2}


async def test_an_empty_batch_needs_no_kafka(commands: Commands) -> None:
    (commands.folder / "in.jsonl").write_bytes(b"\n\n")
    outcome = await commands.run("batch", "in.jsonl", "out.jsonl", LORAMUX_BOOTSTRAP_SERVERS="127.0.0.1:9")
    assert outcome == Outcome(0, "", "")
    assert (commands.folder / "out.jsonl").read_bytes() == b""
