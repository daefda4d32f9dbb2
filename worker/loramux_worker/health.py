"""`/metrics`, `/healthz` and `/readyz` over HTTP, in a thread of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from loramux_worker.errors import ConfigurationError


class HealthServer:
    """Answers probes and Prometheus. `is_ready` decides between 200 and 503 on `/readyz`."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, is_ready: Callable[[], bool]) -> None:
        self._metrics = make_wsgi_app(registry)
        self.is_ready = is_ready
        try:
            self._server: WSGIServer = make_server(host, port, self._app, ThreadingWSGIServer, _QuietHandler)
        except OSError as error:
            raise ConfigurationError(f"--http-port {port}: cannot listen on {host}: {error.strerror}") from None
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._server.server_port

    def start(self) -> None:
        """Serve until `close`."""
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _app(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            page: Iterable[bytes] = self._metrics(environ, start_response)
            return page
        ready = self.is_ready()
        answers = {
            "/healthz": ("200 OK", b"ok\n"),
            "/readyz": ("200 OK", b"ready\n") if ready else ("503 Service Unavailable", b"not ready\n"),
        }
        status, body = answers.get(path, ("404 Not Found", b"try /metrics, /healthz or /readyz\n"))
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))])
        return [body]


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in the base class
        """Say nothing: a probe a second is no event."""
