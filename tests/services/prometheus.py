"""Prometheus on loopback for the tests, from the system's package (Debian: `prometheus`)."""

from __future__ import annotations

import json
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from services.install import ServiceMissing
from services.process import ServerProcess, free_port

START_SECONDS = 60.0

CONFIG = """\
global:
  scrape_interval: {interval}
  evaluation_interval: {interval}
rule_files: [rules.yaml]
scrape_configs:
  - job_name: loramux
    static_configs:
      - targets: {targets}
"""


def program(name: str) -> str:
    """The path of `prometheus` or `promtool`. Raises ServiceMissing."""
    path = shutil.which(name)
    if path is None:
        raise ServiceMissing(f"no `{name}` on PATH (Debian: apt-get install prometheus)")
    return path


class PrometheusServer:
    """A Prometheus from `with` to the end of its block, which scrapes `ports` of loopback and evaluates `rules`."""

    def __init__(self, ports: Sequence[int], rules: str, *, interval: str = "1s") -> None:
        self.port = free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="loramux-prometheus-"))
        targets = json.dumps([f"127.0.0.1:{port}" for port in ports])
        (self._folder / "prometheus.yaml").write_text(CONFIG.format(interval=interval, targets=targets))
        (self._folder / "rules.yaml").write_text(rules)

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The samples of an instant query of now. Raises ValueError for one that Prometheus does not take."""
        url = f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return json.load(response)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{expr}: {json.load(error).get('error')}") from None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> PrometheusServer:
        command = [
            program("prometheus"),
            f"--config.file={self._folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]
        self._server = ServerProcess(command, log_path=self._folder / "prometheus.log")
        self._server.wait_until(self._is_ready, seconds=START_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError):
            return False
