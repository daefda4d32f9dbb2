"""Log lines: what is bound, what is never said."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from loramux_worker.settings import WorkerSettings

WRITE = """
import logging, structlog
from loramux_worker.logs import configure_logs

configure_logs({format!r}, secrets=["kafka-password", 'with "quotes"'])
structlog.contextvars.bind_contextvars(request_id="r-1", partition=3, offset=14)
log = structlog.get_logger("loramux_worker.ours")
log.info("cannot_reach", address="https://user:kafka-password@host/", other='with "quotes"')
logging.getLogger("library").warning("using %s", "token-from-environment")
try:
    prompt = "a prompt that nobody may read"
    raise ValueError("broken")
except ValueError:
    log.exception("request_crashed")
"""


@pytest.fixture(scope="module", params=["json", "text"])
def written(request: pytest.FixtureRequest) -> tuple[str, str]:
    environment = {**os.environ, "HF_TOKEN": "token-from-environment", "TOKENIZERS_PARALLELISM": "broken"}
    run = subprocess.run(
        [sys.executable, "-c", WRITE.format(format=request.param)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return request.param, run.stderr


def test_credentials_and_variables_are_not_written(written: tuple[str, str]) -> None:
    _, lines = written
    for secret in ("kafka-password", "quotes", "token-from-environment", "nobody may read"):
        # the line of code that a traceback quotes is no value of ours
        assert secret not in lines.replace('prompt = "a prompt that nobody may read"', ""), lines
    assert "https://user:***@host/" in lines
    assert "ValueError" in lines
    assert "broken" in lines, "no credential, though its name has TOKEN in it"


def test_json_is_one_object_a_line_with_what_is_bound(written: tuple[str, str]) -> None:
    log_format, text = written
    if log_format != "json":
        assert text.count("request_id=r-1") >= 2
        return
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["event"] for line in lines] == ["cannot_reach", "using ***", "request_crashed"]
    assert all((line["request_id"], line["partition"], line["offset"]) == ("r-1", 3, 14) for line in lines)
    assert lines[2]["exception"][0]["exc_type"] == "ValueError"


def test_settings_name_their_secrets(tmp_path) -> None:
    settings = WorkerSettings(
        model=str(tmp_path),
        adapter_uri="https://user:in-the-uri@host/{adapter_id}",
        security_protocol="SASL_SSL",
        sasl_mechanism="PLAIN",
        sasl_username="me",
        sasl_password="of-kafka",
        otlp_endpoint="http://me:of-traces@host:4318",
    )
    assert set(settings.secrets) == {"in-the-uri", "of-kafka", "of-traces"}
    by_token = WorkerSettings(model=str(tmp_path), sasl_oauthbearer_client_secret="of-the-token-endpoint")
    assert by_token.secrets == ("of-the-token-endpoint",)
