"""The journal of a batch: which lines of the input have been answered, and how.

`out.jsonl.partial`, beside the output, one JSON object a line: first what it belongs to, then the replies as
they came.

    {"loramux_batch": 2, "input": "<digest of the input>", "batch": "<UUID>"}
    {"replies": "lora.replies", "positions": {"0": 1207}}
    {"line": 17, "reply": {…}}

The batch's UUID is in the correlation ids, and in the ids of requests that have none of their own: what was asked
before a kill is recognised after it. All replies to the batch that lie before the last `positions` are in the
journal already; those behind may be in the topic alone.

A line that was cut off by a kill is dropped when the journal is opened again. Replies are handed to the
operating system at once: they survive the end of the process, though not of the machine.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

import orjson

from loramux_producer.errors import JournalError
from loramux_schemas import Reply

if sys.platform != "win32":
    import fcntl

VERSION: Final = 2
BEGINNING: Final = b'{"loramux_batch":'


class Journal:
    """The answered lines of one batch, on disk. Use it as a context manager.

    `batch_id` is the batch's own, whichever run of it this is. `num_errors` of the replies are error replies. Raises
    JournalError for a journal of another input, one that is not ours or damaged, or in use; OSError.
    """

    def __init__(self, path: Path, input_digest: str) -> None:
        self.path = path
        self.num_errors = 0
        self.batch_id = str(uuid.uuid4())
        self._standing: tuple[str, dict[int, int]] | None = None
        # Line number of the input → place of its reply in the journal.
        self._places: dict[int, int] = {}
        self._file: BinaryIO = path.open("a+b")
        try:
            self._lock()
            end = self._read(input_digest)
            self._file.truncate(end)
            if end == 0:
                self._write(_record({"loramux_batch": VERSION, "input": input_digest, "batch": self.batch_id}))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._places and self._standing is None:  # nothing has been asked
            self.path.unlink(missing_ok=True)
        self._file.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, line: int) -> bool:
        return line in self._places

    def positions(self, replies_topic: str) -> dict[int, int] | None:
        """Partition → offset from which replies may be missing here; None if nothing was asked with that topic."""
        topic, positions = self._standing or (None, None)
        return positions if topic == replies_topic else None

    def stand_at(self, replies_topic: str, positions: Mapping[int, int]) -> None:
        """All replies before these positions are here: reading goes on from them, whatever happens."""
        self._standing = replies_topic, dict(positions)
        named = {str(partition): position for partition, position in positions.items()}
        self._write(_record({"replies": replies_topic, "positions": named}))

    def append(self, line: int, reply: Reply) -> None:
        """Line `line` of the input is answered."""
        self._places[line] = self._write(_record({"line": line, "reply": reply.model_dump()}))
        self.num_errors += reply.error is not None

    def replies(self) -> Iterator[dict[str, Any]]:
        """The replies, as JSON objects, in the order of the input."""
        for line in sorted(self._places):
            self._file.seek(self._places[line])
            yield orjson.loads(self._file.readline())["reply"]

    def finish(self, output: Path) -> None:
        """Put all replies into `output`, which appears whole or not at all, and remove the journal."""
        beside = output.with_name(f"{output.name}.writing")
        with beside.open("wb") as file:
            for reply in self.replies():
                file.write(_record(reply))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(output)
        self.path.unlink()

    def _write(self, record: bytes) -> int:
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(record)
        self._file.flush()
        return place

    def _read(self, input_digest: str) -> int:
        """Take in what is there; the length of the part that is whole, in bytes."""
        self._file.seek(0)
        end = 0
        for number, record in enumerate(self._file, start=1):
            cut_off = not record.endswith(b"\n")
            if cut_off and (number > 1 or record.startswith(BEGINNING) or BEGINNING.startswith(record)):
                break
            try:
                self._take(end, orjson.loads(record), input_digest)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise JournalError(
                    f"{self.path}, line {number}: not a batch's journal; remove it to ask everything again"
                ) from None
            end += len(record)
        return end

    def _take(self, place: int, record: dict[str, Any], input_digest: str) -> None:
        if "line" in record and place > 0:
            self._places[int(record["line"])] = place
            self.num_errors += record["reply"]["error"] is not None
        elif place > 0:
            self._standing = record["replies"], {int(name): int(at) for name, at in record["positions"].items()}
        elif record["loramux_batch"] != VERSION:
            raise JournalError(f"{self.path} was written by another version of loramux: remove it")
        elif record["input"] != input_digest:
            raise JournalError(
                f"{self.path} belongs to an input that has changed since; remove the journal to ask everything again"
            )
        else:
            self.batch_id = str(uuid.UUID(record["batch"]))

    def _lock(self) -> None:
        if sys.platform != "win32":
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise JournalError(f"{self.path} is in use: the batch runs already") from None


def _record(fields: dict[str, Any]) -> bytes:
    return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)
