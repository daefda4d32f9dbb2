"""Passwords, tokens and keys are in no log, no repr and no error, whatever fails and however much is logged."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from loramux_worker.adapters.source import misconfigured
from loramux_worker.errors import ConfigurationError
from loramux_worker.settings import WorkerSettings
from loramux_worker.settings_sources import load_settings

SECRET = "h7nter2canary"

# Everything that a worker asks of the outside, and a crash with the secret in a variable.
SCRIPT = """
import asyncio, os, sys
import structlog
from loramux_worker.adapters.store import AdapterStore
from loramux_worker.errors import RequestFailed
from loramux_worker.logs import configure_logs
from loramux_schemas import KafkaConnection

configure_logs(sys.argv[1], "debug")
log = structlog.get_logger("loramux_worker.test")

async def refused(template):
    try:
        await AdapterStore(template, timeout=0.5).list("acme/support")
    except RequestFailed as failed:
        log.info("refused", template_scheme=template[:5], reason=failed.message)
    else:
        raise SystemExit("not refused")

async def main():
    host = os.environ["HF_ENDPOINT"].removeprefix("http://")
    for template in ("s3://bucket/{adapter_id}", "hf://{adapter_id}", f"http://me:{SECRET}@{host}/{{adapter_id}}",
                     f"http://me:{SECRET}@127.0.0.1:9/{{adapter_id}}"):
        await refused(template)
    secured = {"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER",
        "sasl_oauthbearer_token_endpoint_url": os.environ["HF_ENDPOINT"],
        "sasl_oauthbearer_client_id": "me", "sasl_oauthbearer_client_secret": SECRET}
    for settings in (secured, {**secured, "sasl_mechanism": "AWS_MSK_IAM", "sasl_aws_region": "x"}):
        try:
            provider = KafkaConnection(**settings).client_options()["sasl_oauth_token_provider"]
            await provider.token()
        except Exception:
            log.exception("no_token")

SECRET = os.environ["LORAMUX_SASL_PASSWORD"]
asyncio.run(main())
try:
    options = {"sasl_plain_password": SECRET}
    options["missing"]
except KeyError:
    log.exception("crashed")
"""


class Echo(BaseHTTPRequestHandler):
    """A server that refuses everything and repeats what it was sent."""

    server: Any

    def do_GET(self) -> None:
        self.server.authorizations.append(self.headers["Authorization"])
        self.send_response(403)
        self.send_header("X-Echo", str(self.headers["Authorization"]))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(str(self.headers).encode())

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        """Silence."""


@pytest.fixture
def echo() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        server.authorizations = []  # type: ignore[attr-defined]
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_logs_at_level_debug(echo: Any, log_format: str) -> None:
    url = f"http://127.0.0.1:{echo.server_port}"
    environment = {
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": f"session-{SECRET}",
        "AWS_ENDPOINT_URL": url,
        "AWS_REGION": "eu-west-1",
        "HF_TOKEN": f"hf_{SECRET}",
        "HF_ENDPOINT": url,
        "LORAMUX_SASL_PASSWORD": SECRET,
    }
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, log_format],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    shown = ran.stdout + ran.stderr
    assert ran.returncode == 0, shown
    assert SECRET not in shown
    for event in ("adapter_store_failed", "no_token", "crashed", "KeyError"):
        assert event in shown
    assert f"Bearer hf_{SECRET}" in echo.authorizations  # it went where it belongs
    assert any((said or "").startswith("AWS4-HMAC-SHA256") for said in echo.authorizations)
    assert any((said or "").startswith("Basic ") for said in echo.authorizations)


def test_settings_and_what_is_wrong_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_SASL_PASSWORD", SECRET)
    monkeypatch.setenv("LORAMUX_SASL_USERNAME", "me")
    settings = load_settings(["--model", "m", "--security-protocol", "SASL_SSL"])
    assert isinstance(settings, WorkerSettings)
    assert settings.connection.client_options()["sasl_plain_password"] == SECRET
    for shown in (repr(settings), str(settings), settings.model_dump_json(), repr(settings.connection)):
        assert SECRET not in shown
    for arguments in (
        [],
        ["--security-protocol", "TLS"],
        ["--security-protocol", "SASL_SSL", "--sasl-mechanism", "OAUTHBEARER"],
        ["--no-such-password", SECRET],
        [f"--no-such-password={SECRET}"],
        ["--sasl-oauthbearer-token-endpoint-url", f"https://me:{SECRET}@host/", "--security-protocol", "SASL_SSL"],
    ):
        with pytest.raises(ConfigurationError) as wrong:
            load_settings(["--model", "m", *arguments])
        assert SECRET not in str(wrong.value)
        assert "\n" not in str(wrong.value)


def test_a_template_with_a_password() -> None:
    shown = str(misconfigured(f"https://me:{SECRET}@host/x", "has no {adapter_id}"))
    assert shown == "--adapter-uri https://…@host/x: has no {adapter_id}"
    assert "hf://{adapter_id}@v1" in str(misconfigured("hf://{adapter_id}@v1", "is wrong"))
