"""Bearer tokens for Kafka: one request for all who wait, renewed in time, refused in one line without the secret."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from aiokafka.errors import KafkaConnectionError, KafkaError, SaslAuthenticationFailed

from loramux_schemas import KafkaConnection
from loramux_schemas.tokens import BearerTokens, KeptToken, Token
from services.process import free_port

SECRET = "s3cr+t/%word"


class Endpoint(BaseHTTPRequestHandler):
    """An OAuth 2 token endpoint that answers `server.answers` in their order, the last one for ever."""

    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.requests.append((self.path, dict(self.headers), parse_qs(body)))
        answers = self.server.answers
        status, answer = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: Any) -> None:
        """Silence."""


@pytest.fixture
def endpoint() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        server.requests, server.answers = [], [(200, {"access_token": "t-1", "expires_in": 100})]  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def provider(port: int, **settings: Any) -> BearerTokens:
    """What aiokafka would be given."""
    connection = KafkaConnection(
        security_protocol="SASL_SSL",
        sasl_mechanism="OAUTHBEARER",
        sasl_oauthbearer_token_endpoint_url=f"http://127.0.0.1:{port}/token?realm=x",
        sasl_oauthbearer_client_id="worker 1",
        sasl_oauthbearer_client_secret=SECRET,  # type: ignore[arg-type]
        **settings,
    )
    options = connection.client_options()
    assert options["sasl_mechanism"] == "OAUTHBEARER"
    assert SECRET not in repr(options) + repr(connection)
    assert connection.client_options()["sasl_oauth_token_provider"] is options["sasl_oauth_token_provider"]
    found: BearerTokens = options["sasl_oauth_token_provider"]
    return found


async def test_one_request_for_all_who_wait(endpoint: Any) -> None:
    tokens = provider(endpoint.server_port, sasl_oauthbearer_scope="kafka all")
    assert await asyncio.gather(*(tokens.token() for _ in range(20))) == ["t-1"] * 20
    [(path, headers, form)] = endpoint.requests
    assert path == "/token?realm=x"
    assert form == {"grant_type": ["client_credentials"], "scope": ["kafka all"]}
    # RFC 6749 §2.3.1: each part is form-encoded before it goes into HTTP Basic
    pair = base64.b64decode(headers["Authorization"].removeprefix("Basic ")).decode()
    assert pair == "worker+1:s3cr%2Bt%2F%25word"


@pytest.mark.parametrize(
    ("status", "answer", "permanent", "said"),
    [
        (401, {"error": "invalid_client", "error_description": f"bad secret {SECRET}\n"}, True, "401 (invalid_client"),
        (400, b"<html>", True, "answered 400"),
        (302, b"", True, "answered 302"),
        (200, {"token": "t"}, True, "without an access_token"),
        (200, b"[]", True, "without an access_token"),
        (200, {"access_token": "a\nb"}, True, "without an access_token"),
        (503, b"", False, "answered 503"),
        (429, {"error": "slow_down"}, False, "answered 429 (slow_down)"),
    ],
)
async def test_an_endpoint_that_gives_no_token(
    endpoint: Any, status: int, answer: object, permanent: bool, said: str
) -> None:
    endpoint.answers = [(status, answer)]
    with pytest.raises(KafkaError) as refused:
        await provider(endpoint.server_port).token()
    assert type(refused.value) is (SaslAuthenticationFailed if permanent else KafkaConnectionError)
    text = str(refused.value)
    assert said in text
    assert SECRET not in text
    assert text.isprintable()
    assert len(endpoint.requests) == 1  # a redirect is not followed: it would take the secret along


async def test_an_endpoint_that_is_away() -> None:
    with pytest.raises(KafkaConnectionError, match="does not answer"):
        await provider(free_port()).token()


async def test_a_token_is_renewed_in_time_and_used_while_its_source_fails(caplog: pytest.LogCaptureFixture) -> None:
    now, fetched = 0.0, 0
    failing: KafkaError | None = None

    def fetch() -> Token:
        nonlocal fetched
        fetched += 1
        if failing is not None:
            raise failing
        return Token(f"t-{fetched}", 100.0)

    tokens = KeptToken(fetch, clock=lambda: now)
    assert await tokens.token() == "t-1"
    now = 79.0
    assert (await tokens.token(), fetched) == ("t-1", 1)
    now = 81.0
    assert await tokens.token() == "t-2"
    failing, now = KafkaConnectionError("away"), 165.0
    with caplog.at_level(logging.WARNING):
        assert (await tokens.token(), fetched) == ("t-2", 3)
        assert (await tokens.token(), fetched) == ("t-2", 3)  # not asked again at once
    assert "away" in caplog.text
    now = 171.0
    assert (await tokens.token(), fetched) == ("t-2", 4)
    now = 182.0  # t-2 is at its end
    with pytest.raises(KafkaConnectionError, match="away"):
        await tokens.token()
    failing = None
    assert await tokens.token() == "t-6"


def test_one_token_for_several_event_loops(endpoint: Any) -> None:
    tokens = provider(endpoint.server_port)
    for _ in range(3):
        assert asyncio.run(asyncio.wait_for(tokens.token(), 30)) == "t-1"
    assert len(endpoint.requests) == 1


async def test_whatever_a_provider_raises_can_be_tried_again() -> None:
    class Mine:
        async def token(self) -> str:
            raise LookupError(SECRET)

    connection = KafkaConnection(
        security_protocol="SASL_SSL", sasl_mechanism="OAUTHBEARER", sasl_oauth_token_provider=Mine()
    )
    with pytest.raises(KafkaConnectionError, match="LookupError") as failed:
        await connection.client_options()["sasl_oauth_token_provider"].token()
    assert SECRET not in str(failed.value)


def msk() -> KafkaConnection:
    return KafkaConnection(security_protocol="SASL_SSL", sasl_mechanism="AWS_MSK_IAM", sasl_aws_region="eu-west-1")


async def test_msk_gets_a_signed_request_as_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    options = msk().client_options()
    assert options["sasl_mechanism"] == "OAUTHBEARER"  # its form on the wire
    token = await options["sasl_oauth_token_provider"].token()
    assert await options["sasl_oauth_token_provider"].token() == token
    url = urlsplit(base64.urlsafe_b64decode(token + "==").decode())
    asked = parse_qs(url.query)
    assert url.hostname == "kafka.eu-west-1.amazonaws.com"
    assert asked["Action"] == ["kafka-cluster:Connect"]
    assert asked["X-Amz-Credential"][0].startswith("AKIDEXAMPLE/")
    assert asked["X-Amz-Signature"][0]
    assert SECRET not in url.geturl()


async def test_msk_without_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(SaslAuthenticationFailed, match="no token with the AWS credentials of this machine"):
        await msk().client_options()["sasl_oauth_token_provider"].token()


def test_msk_without_its_signer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aws_msk_iam_sasl_signer", None)
    with pytest.raises(ValueError, match=r"pip install 'loramux\[msk\]'"):
        msk().client_options()
