"""An S3 server on loopback for the tests: versitygw over a temporary folder."""

from __future__ import annotations

import secrets
import shutil
import signal
import tempfile
from pathlib import Path
from types import TracebackType

from obstore.store import S3Store

from services.install import versitygw
from services.process import ServerProcess, answers, free_port, tail


class S3Server:
    """An S3 server from `with` to the end of its block.

        with S3Server() as s3:
            s3.create_bucket("adapters")
            s3.store("adapters").put("acme/support/adapter_config.json", b"{}")

    Raises ServiceMissing when versitygw is not installed, ServerFailed (with its log) when it does not start.
    """

    region = "us-east-1"

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="loramux-s3-"))
        self.access_key = "loramux-test"
        self.secret_key = secrets.token_hex(16)
        self.port = free_port()
        self._server: ServerProcess | None = None

    @property
    def endpoint(self) -> str:
        """The server's URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that point AWS clients, and so `loramux worker`, at this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_ALLOW_HTTP": "true",
        }

    @property
    def log_path(self) -> Path:
        """The server's log file."""
        return self.folder / "versitygw.log"

    def create_bucket(self, name: str) -> str:
        """Makes an empty bucket (a folder, to this server) and returns its name."""
        (self.folder / "buckets" / name).mkdir()
        return name

    def store(self, bucket: str) -> S3Store:
        """An obstore client of one bucket."""
        return S3Store(
            bucket,
            endpoint=self.endpoint,
            access_key_id=self.access_key,
            secret_access_key=self.secret_key,
            region=self.region,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )

    def start(self) -> None:
        """Starts the server, again on the port and the buckets that it had."""
        metadata, buckets = self.folder / "metadata", self.folder / "buckets"
        for path in (metadata, buckets):
            path.mkdir(exist_ok=True)
        # Metadata beside the files: not every temporary folder can hold extended attributes.
        serving: list[str | Path] = ["--port", f"127.0.0.1:{self.port}", "posix", "--sidecar", metadata]
        keys = {"ROOT_ACCESS_KEY_ID": self.access_key, "ROOT_SECRET_ACCESS_KEY": self.secret_key}
        self._server = ServerProcess([versitygw(), *serving, buckets], log_path=self.log_path, environment=keys)
        self._server.wait_until(lambda: answers(self.port), seconds=30)

    def stop(self) -> None:
        """Ends the server; its buckets stay for `start`."""
        if self._server is not None:
            self._server.kill()
            self._server = None

    def freeze(self) -> None:
        """The server takes connections and says nothing (SIGSTOP) until `thaw`."""
        if self._server is not None:
            self._server.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Ends `freeze`."""
        if self._server is not None:
            self._server.signal(signal.SIGCONT)

    def recent_logs(self) -> str:
        """The last lines of the server's log."""
        return f"--- versitygw ---\n{tail(self.log_path)}"

    def __enter__(self) -> S3Server:
        try:
            self.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(self.recent_logs())
        self._end()

    def _end(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
