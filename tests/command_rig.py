"""The client's commands as processes, for tests."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass
from pathlib import Path

from services.responder import Responder

SECONDS = 60.0


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


class Commands:
    """Starts the client's commands against one test's own topics."""

    def __init__(
        self,
        servers: str,
        requests_topic: str,
        replies_topic: str,
        stream_topic: str,
        control_topic: str,
        folder: Path,
    ) -> None:
        self.folder = folder
        self.servers = servers
        self.control_topic = control_topic
        self.responder = Responder(servers, requests_topic, replies_topic, stream_topic)
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "LORAMUX_BOOTSTRAP_SERVERS": servers,
            "LORAMUX_REQUESTS_TOPIC": requests_topic,
            "LORAMUX_REPLIES_TOPIC": replies_topic,
            "LORAMUX_STREAM_TOPIC": stream_topic,
            "LORAMUX_CONTROL_TOPIC": control_topic,
        }

    async def start(self, *arguments: str | Path, **environment: str) -> Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loramux_producer", *map(str, arguments)),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            cwd=self.folder,
            env={**self._environment, **environment},
        )

    async def run(self, *arguments: str | Path, stdin: str = "", **environment: str) -> Outcome:
        return await end(await self.start(*arguments, **environment), stdin)


async def end(process: Process, stdin: str = "") -> Outcome:
    async with asyncio.timeout(SECONDS):
        out, err = await process.communicate(stdin.encode())
    assert process.returncode is not None
    return Outcome(process.returncode, out.decode(), err.decode())
