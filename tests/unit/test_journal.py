"""The journal of a batch: what it keeps, what a kill may cut off, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_producer.errors import JournalError
from loramux_producer.journal import Journal
from loramux_schemas import ErrorCode, Reply

DIGEST = "0" * 32
HEADER = b'{"loramux_batch":2,"input":"%s","batch":"0193b7d2-0000-4000-8000-000000000000"}\n' % DIGEST.encode()


def ok(request_id: str) -> Reply:
    return Reply(request_id=request_id, generated_text=f"answer to {request_id}", token_ids=(1, 2))


def failed(request_id: str) -> Reply:
    return Reply.failure(ErrorCode.INTERNAL, "as asked", request_id=request_id)


def test_replies_come_back_in_the_order_of_the_input(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Journal(tmp_path / "out.jsonl.partial", DIGEST) as journal:
        for line in (7, 2, 5):
            journal.append(line, ok(f"r{line}"))
        journal.append(3, failed("r3"))
        assert journal.num_errors == 1
        journal.finish(output)
    assert [orjson.loads(line)["request_id"] for line in output.read_bytes().splitlines()] == ["r2", "r3", "r5", "r7"]
    assert Reply.from_json(output.read_bytes().splitlines()[0]) == ok("r2")
    assert list(tmp_path.iterdir()) == [output]


@settings(deadline=None)
@given(lines=st.lists(st.integers(1, 50), unique=True, max_size=12), cut=st.integers(0, 10_000))
def test_whatever_is_cut_off_only_the_last_reply_is_lost(
    tmp_path_factory: pytest.TempPathFactory, lines: list[int], cut: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "out.jsonl.partial"
    with Journal(path, DIGEST) as journal:
        for line in lines:
            journal.append(line, ok(f"r{line}"))
    if not path.exists():
        assert not lines
        return
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % (len(whole) + 1)])
    kept = path.read_bytes().count(b"\n") - 1
    with Journal(path, DIGEST) as journal:
        assert len(journal) == max(0, kept)
        assert all(line in journal for line in lines[: max(0, kept)])
        for line in lines:
            if line not in journal:
                journal.append(line, ok(f"r{line}"))
        assert [reply["request_id"] for reply in journal.replies()] == [f"r{line}" for line in sorted(lines)]
    # A batch whose very name was cut off is another batch: nothing had been asked.
    assert path.read_bytes() == whole or kept < 0


def test_another_input_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.partial"
    with Journal(path, DIGEST) as journal:
        journal.append(1, ok("r1"))
    before = path.read_bytes()
    with pytest.raises(JournalError, match="input that has changed"):
        Journal(path, "1" * 32)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"my notes",
        b"my notes\n",
        b"[]\n",
        b'{"loramux_batch": 99, "input": "00"}\n',
        HEADER.replace(b":2", b":1"),
        HEADER.replace(b"-", b"+"),
        HEADER + b'rubbish\n{"line":1}\n',
        HEADER + b'{"replies":"t","positions":[]}\n{"line":1}\n',
    ],
)
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out.jsonl.partial"
    path.write_bytes(content)
    with pytest.raises(JournalError, match="remove it") as caught:
        Journal(path, DIGEST)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_journal_in_use_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.partial"
    with Journal(path, DIGEST) as journal:
        journal.append(1, ok("r1"))
        with pytest.raises(JournalError, match="in use"):
            Journal(path, DIGEST)
    with Journal(path, DIGEST) as journal:
        assert len(journal) == 1


def test_a_batch_that_got_nowhere_leaves_no_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "out.jsonl.partial", DIGEST):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_journal_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=os.strerror(2)):
        Journal(tmp_path / "nowhere" / "j", DIGEST)


def test_the_batch_keeps_its_name_and_its_place(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.partial"
    with Journal(path, DIGEST) as journal:
        name = journal.batch_id
        assert journal.positions("replies") is None
        journal.stand_at("replies", {0: 5, 11: 0})
    with Journal(path, DIGEST) as journal:
        assert journal.batch_id == name
        assert journal.positions("replies") == {0: 5, 11: 0}
        assert journal.positions("other") is None, "places in another topic say nothing"
        assert len(journal) == 0
        journal.append(2, ok("r2"))
        journal.stand_at("other", {0: 1})
    with Journal(path, DIGEST) as journal:
        assert (journal.positions("replies"), journal.positions("other")) == (None, {0: 1})
        assert [reply["request_id"] for reply in journal.replies()] == ["r2"]
    with Journal(tmp_path / "another", DIGEST) as journal:
        assert journal.batch_id != name
