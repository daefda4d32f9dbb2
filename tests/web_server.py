"""Web servers on loopback for tests of stores: a plain one, and one that speaks like the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import unquote


class WebHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.note(f"{self.command} {path}", dict(self.headers))
        if self.server.failures > 0:
            self.server.failures -= 1
            self.answer(self.server.failure_status)
        elif path in self.server.denied:
            self.answer(403)
        else:
            self.respond(path)

    def do_HEAD(self) -> None:
        self.do_GET()

    def respond(self, path: str) -> None:
        if (content := self.server.files.get(unquote(path))) is None:
            self.answer(404)
        else:
            self.send_content(path, content)

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def send_content(self, path: str, content: bytes, headers: dict[str, str] | None = None) -> None:
        wanted, first, last = self.headers["Range"], 0, len(content)
        if wanted is not None and self.server.ranges:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end) + 1, len(content)) if end else len(content)
        lines = {"Content-Length": str(last - first), "Last-Modified": "Mon, 01 Jun 2026 00:00:00 GMT"}
        if self.server.etags:
            lines["ETag"] = f'"{len(content)}"'
        if wanted is not None and self.server.ranges:
            lines["Content-Range"] = f"bytes {first}-{last - 1}/{len(content)}"
        self.answer(206 if "Content-Range" in lines else 200, lines | (headers or {}))
        if self.command == "GET":
            with self.server.sending():
                self.send_body(path, memoryview(content)[first:last])

    def send_body(self, path: str, body: memoryview) -> None:
        """All of it, or half where the server's tables say so."""
        server = self.server
        half = body[: len(body) // 2]
        if server.breaks[path] > 0 or (path in server.broken and len(body) == len(server.files[path])):
            server.breaks[path] -= 1
            self.wfile.write(half)
            self.close_connection = True
        elif server.stalls[path] > 0:
            server.stalls[path] -= 1
            self.wfile.write(half)
            server.ended.wait()
            self.close_connection = True
        elif (seconds := server.throttled.get(path)) is not None:
            for piece in range(20):
                self.wfile.write(body[len(body) * piece // 20 : len(body) * (piece + 1) // 20])
                server.ended.wait(seconds / 20)
        else:
            self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Quiet."""


class WebServer(ThreadingHTTPServer):
    """Serves `files` by path.

    The next `failures` requests get `failure_status`, paths in `denied` 403; whole files in `broken` always end half
    way, and so do the next `breaks[path]` answers; `stalls` end there without ending; `throttled` take some seconds.
    """

    handler: type[WebHandler] = WebHandler

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.handler)
        self.files: dict[str, bytes] = {}
        self.denied: set[str] = set()
        self.broken: set[str] = set()
        self.breaks: Counter[str] = Counter()
        self.stalls: Counter[str] = Counter()
        self.throttled: dict[str, float] = {}
        self.failures = 0
        self.failure_status = 503
        self.ranges = self.etags = True
        self.requests: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.running = self.most_running = 0
        self.ended = threading.Event()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def note(self, request: str, headers: dict[str, str]) -> None:
        with self._lock:
            self.requests[request] += 1
            self.headers.append({name.lower(): value for name, value in headers.items()})

    @contextmanager
    def sending(self) -> Iterator[None]:
        with self._lock:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class HubHandler(WebHandler):
    server: HubServer

    def respond(self, path: str) -> None:
        words = path.strip("/").split("/")
        api = words[:2] == ["api", "models"]
        repo_id = "/".join(words[2:4] if api else words[:2])
        repository = self.server.repositories.get(repo_id)
        token = self.headers["Authorization"]
        if repo_id in self.server.private and token != "Bearer hf_secret":
            return self.refuse(401, "RepoNotFound")
        if repo_id in self.server.gated:
            return self.refuse(403, "GatedRepo")
        if repository is None:
            return self.refuse(404 if token else 401, "RepoNotFound")
        name, key = unquote(words[5] if len(words) > 5 else "main") if api else unquote(words[3]), "/".join(words[4:])
        commit = self.server.branches.get((repo_id, name), name)
        if (files := repository.get(commit)) is None:
            return self.refuse(404, "RevisionNotFound")
        if api:
            body = {"id": repo_id, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return self.answer(200, {"Content-Type": "application/json"}, json.dumps(body).encode())
        if (content := files.get(key)) is None:
            return self.refuse(404, "EntryNotFound")
        commits = {"X-Repo-Commit": commit}
        if not key.endswith(".safetensors"):
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            return self.send_content(path, content, commits | {"ETag": f'"{blob}"'})
        digest = hashlib.sha256(content).hexdigest()
        self.server.storage.files[f"/{digest}"] = self.server.stored.get(digest, content)
        target = f"{self.server.storage.url}/{digest}?X-Amz-Signature=secret"
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)), "Location": target}
        return self.answer(302, commits | linked)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"X-Error-Code": code})


class HubServer(WebServer):
    """The part of the hub that an adapter is read from; weights are on `storage`, another server.

    `repositories`: by id, files by commit; `branches`: commits by (id, branch or tag). `stored` are contents that the
    storage has under another digest than theirs.
    """

    handler = HubHandler

    def __init__(self, storage: WebServer) -> None:
        super().__init__()
        self.storage = storage
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.stored: dict[str, bytes] = {}

    def commit(self, repo_id: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Adds a commit with these files and moves the branch there; its id."""
        commits = self.repositories.setdefault(repo_id, {})
        name = hashlib.sha1(f"{repo_id} {len(commits)}".encode()).hexdigest()
        commits[name] = files
        self.branches[repo_id, branch] = name
        return name


AnyServer = TypeVar("AnyServer", bound=WebServer)


@contextmanager
def serving(server: AnyServer) -> Iterator[AnyServer]:
    """Runs a server in a thread until the end of the block."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
