"""TLS, SASL and tenants against a real broker: who has the right words gets in, all others are told why, at once."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from loramux_producer import Client, ClientError, ReplyFailed
from loramux_schemas import KafkaConnection
from loramux_worker.errors import ConfigurationError
from loramux_worker.kafka.connecting import started_admin
from services.kafka import KafkaCluster
from services.kafka_security import WireSecurity
from services.serving import new_topics
from services.worker import WorkerProcess
from tiny_models import make_model
from wire_rig import Secured, Token, TokenEndpoint, settings

pytestmark = pytest.mark.kafka

STARTUP_TIMEOUT = 30.0
AT_ONCE = 20.0  # seconds for all refusals of this file, on a busy machine: one takes less than one


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    with KafkaCluster(security=WireSecurity(tmp_path_factory.mktemp("security"))) as secured:
        yield secured


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER", "mutual TLS"])
async def test_the_right_words(cluster: KafkaCluster, mechanism: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="aiokafka")
    right = settings(cluster, mechanism)
    admin = await started_admin(KafkaConnection(**right), timeout=STARTUP_TIMEOUT)
    assert (await admin.describe_cluster())["brokers"]
    await admin.close()
    # aiokafka's own log, at the level where it shows every request, shows none that has a password or a token
    assert "Request to" in caplog.text
    assert "SaslAuthenticateRequest" not in caplog.text
    assert right.get("sasl_password", "alice's word") not in caplog.text


NO_SASL = {"sasl_mechanism": None, "sasl_username": None, "sasl_password": None}
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "password, PLAIN": ("PLAIN", {"sasl_password": "h7nter2"}, "refuses user 'alice' by PLAIN"),
    "password, 256": ("SCRAM-SHA-256", {"sasl_password": "h7nter2"}, "refuses user 'alice' by SCRAM-SHA-256"),
    "password, 512": ("SCRAM-SHA-512", {"sasl_password": "h7nter2"}, "refuses user 'alice' by SCRAM-SHA-512"),
    "user": ("SCRAM-SHA-512", {"sasl_username": "bob"}, "refuses user 'bob'"),
    "scope": ("OAUTHBEARER", {"sasl_oauth_token_provider": Token(scope="other")}, "insufficient_scope"),
    "expired token": ("OAUTHBEARER", {"sasl_oauth_token_provider": Token(-60.0)}, "invalid_token"),
    "authority": ("PLAIN", {"ssl_cafile": "STRANGER"}, "not trusted"),
    "no authority": ("PLAIN", {"ssl_cafile": None}, "is ssl_cafile its authority?"),
    "no certificate": ("mutual TLS", {"ssl_certfile": None}, "ssl_certfile"),
    "no SASL": ("PLAIN", {**NO_SASL, "security_protocol": "SSL"}, "security_protocol"),
    "no TLS": ("PLAIN", {"security_protocol": "SASL_PLAINTEXT", "ssl_cafile": None}, "it speaks TLS"),
    "plaintext": ("PLAIN", {**NO_SASL, "security_protocol": "PLAINTEXT", "ssl_cafile": None}, "it speaks TLS"),
    "SASL where there is none": (
        "PLAIN",
        {"bootstrap_servers": "PLAIN LISTENER", "security_protocol": "SASL_PLAINTEXT", "ssl_cafile": None},
        "it does no SASL here",
    ),
}


async def test_what_is_wrong_is_told_at_once(cluster: KafkaCluster) -> None:
    """By the worker's part as by the client, in one line without the password, long before they stop waiting."""
    assert cluster.security is not None
    words = {"STRANGER": str(cluster.security.stranger_file), "PLAIN LISTENER": cluster.bootstrap_servers}

    async def told(case: str) -> tuple[str, str]:
        mechanism, changes, _ = WRONG[case]
        known = {name: words.get(value, value) if isinstance(value, str) else value for name, value in changes.items()}
        connection = KafkaConnection(**settings(cluster, mechanism, **known))
        with pytest.raises(ConfigurationError) as worker:
            await started_admin(connection, timeout=STARTUP_TIMEOUT)
        with pytest.raises(ClientError) as client:
            await Client(connection=connection, connect_timeout=STARTUP_TIMEOUT).start()
        return str(worker.value), str(client.value)

    begun = time.monotonic()
    lines = dict(zip(WRONG, await asyncio.gather(*map(told, WRONG)), strict=True))
    assert time.monotonic() - begun < AT_ONCE
    await all_closed()
    for case, (worker_line, client_line) in lines.items():
        assert worker_line.startswith("--bootstrap-servers: 127.0.0.1:"), case
        assert client_line.startswith("Kafka refuses this client: 127.0.0.1:"), case
        for line in (worker_line, client_line):
            assert WRONG[case][2] in line, case
            assert line.isprintable(), case
            assert "h7nter2" not in line, case


async def all_closed(seconds: float = 10.0) -> None:
    """Wait for the connections that aiokafka gives up without waiting for their end."""
    sockets = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]
    limit = time.monotonic() + seconds
    while len(sockets.get_map()) > 1:  # the loop's own stays
        assert time.monotonic() < limit, "connections stay open"
        await asyncio.sleep(0.01)


async def test_records_flow_on_while_tokens_expire(cluster: KafkaCluster) -> None:
    """The broker hangs up on a connection whose token has expired; the next one has a new token."""
    cluster.create_topic("expiring")
    with ThreadingHTTPServer(("127.0.0.1", 0), TokenEndpoint) as endpoint:
        endpoint.given = 0  # type: ignore[attr-defined]
        thread = threading.Thread(target=endpoint.serve_forever, args=(0.01,))
        thread.start()
        connection = KafkaConnection(
            **settings(cluster, "OAUTHBEARER", sasl_oauth_token_provider=None),
            sasl_oauthbearer_token_endpoint_url=f"http://127.0.0.1:{endpoint.server_port}/token",
            sasl_oauthbearer_client_id="alice",
            sasl_oauthbearer_client_secret="s",  # type: ignore[arg-type]
        )
        options = connection.client_options()
        received: list[bytes] = []
        begun = time.monotonic()
        async with (
            AIOKafkaProducer(**options, acks="all", enable_idempotence=True) as producer,
            AIOKafkaConsumer("expiring", **options, auto_offset_reset="earliest") as consumer,
        ):
            for i in range(12):
                await producer.send_and_wait("expiring", str(i).encode())
                await asyncio.sleep(0.35)
            until = time.monotonic() + 30
            while len(received) < 12 and time.monotonic() < until:
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    received += [record.value for record in records]
        lifetimes = (time.monotonic() - begun) / 1.5
        endpoint.shutdown()
        thread.join()
    assert received == [str(i).encode() for i in range(12)]
    assert 3 <= endpoint.given <= 2 + 2 * lifetimes  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def secured(cluster: KafkaCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    model = make_model(tmp_path_factory.mktemp("model"), "llama", num_adapters=3)
    topics = new_topics(cluster)
    tenants = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    tenants.write_text('default = ["base"]\n[tenants]\nacme = ["tenant-0/*", "no/such"]\n')
    flags = settings(cluster, "SCRAM-SHA-512")
    servers, password = flags.pop("bootstrap_servers"), flags.pop("sasl_password")
    flags |= {"adapter_uri": f"file://{model.adapters}/{{adapter_id}}", "dtype": "float32", "log_level": "debug"}
    flags |= {"authorization_file": tenants, "group_id": "secured", "reply_topics": "*"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAMUX_SASL_PASSWORD", password)
        patch.setenv("AWS_SECRET_ACCESS_KEY", "h7nter2-aws")
        patch.setenv("HF_TOKEN", "h7nter2-hf")
        with WorkerProcess(servers, model.path, **flags, **topics) as worker:
            yield Secured(cluster, worker, model, topics, tenants)


async def refusal(client: Client, **fields: Any) -> tuple[str, str]:
    """Code and message of the error reply to a request."""
    with pytest.raises(ReplyFailed) as failed:
        await client.generate("x", max_new_tokens=2, **fields)
    assert failed.value.reply.error is not None
    return failed.value.code, failed.value.reply.error.message


async def test_tenants_and_their_adapters(secured: Secured) -> None:
    mine, other = secured.model.adapter_ids[0], secured.model.adapter_ids[1]
    async with secured.client(headers=[("tenant", b"acme")]) as acme, secured.client() as nobody:
        for allowed in (mine, None):
            assert (await acme.generate("x", adapter_id=allowed, max_new_tokens=2)).status == "ok"
        assert (await nobody.generate("x", max_new_tokens=2)).status == "ok"
        lookups = secured.worker.metric("loramux_adapter_lookups_total")
        code, message = await refusal(acme, adapter_id=other)
        assert (code, message) == ("forbidden", f"tenant 'acme' may not use adapter '{other}'")
        code, message = await refusal(nobody, adapter_id=mine)
        assert (code, message) == ("forbidden", f"a request without header 'tenant' may not use adapter '{mine}'")
        # what is not there is told only to who may use it; of the others nobody looks
        assert (await refusal(nobody, adapter_id="no/such"))[0] == "forbidden"
        assert secured.worker.metric("loramux_adapter_lookups_total") == lookups
        assert (await refusal(acme, adapter_id="no/such"))[0] == "adapter_not_found"

        secured.tenants.write_text("[tenants]\nacme = [")
        await logged(secured.worker, "authorization_kept")
        assert (await acme.generate("x", adapter_id=mine, max_new_tokens=2)).status == "ok"
        secured.tenants.write_text(f'[tenants]\nacme = ["{other}"]\n')
        await logged(secured.worker, "authorization_changed")
        assert (await acme.generate("x", adapter_id=other, max_new_tokens=2)).status == "ok"
        assert (await refusal(acme, adapter_id=mine))[0] == "forbidden"
        assert (await refusal(nobody))[0] == "forbidden"
        secured.tenants.write_text('default = ["base", "*"]\n')
        await logged(secured.worker, "authorization_changed", times=2)
        assert (await nobody.generate("x", adapter_id=mine, max_new_tokens=2)).status == "ok"


async def logged(worker: WorkerProcess, event: str, times: int = 1, seconds: float = 20.0) -> None:
    """Wait until the worker has logged an event so many times."""
    limit = time.monotonic() + seconds
    while worker.log_path.read_text().count(event) < times:
        assert time.monotonic() < limit, f"no {event} within {seconds} s"
        await asyncio.sleep(0.05)


async def test_replies_go_to_no_topic_of_others(secured: Secured) -> None:
    """With --reply-topics '*': never back to the requests, and to Kafka's own and the dead letters not by a pattern."""
    async with AIOKafkaProducer(bootstrap_servers=secured.cluster.bootstrap_servers) as producer:
        reading = AIOKafkaConsumer(secured.topics["replies_topic"], bootstrap_servers=secured.cluster.bootstrap_servers)
        async with reading as consumer:
            for name in consumer.assignment():
                await consumer.seek_to_end(name)
                await consumer.position(name)
            refused = (secured.topics["requests_topic"], secured.topics["dead_letter_topic"], "__consumer_offsets")
            for topic in refused:
                value = json.dumps({"request_id": topic, "prompt": "x", "max_tokens": 1}).encode()
                headers = [("reply_to", topic.encode())]
                await producer.send_and_wait(secured.topics["requests_topic"], value, headers=headers)
            codes: dict[str, str] = {}
            until = time.monotonic() + 30
            while len(codes) < len(refused) and time.monotonic() < until:
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    for record in records:
                        reply = json.loads(record.value)
                        codes[reply["request_id"]] = (reply["error"] or {"code": None})["code"]
    assert codes == dict.fromkeys(refused, "invalid_request")


def loramux(arguments: list[str], environment: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """A command with settings from its environment."""
    variables = {f"LORAMUX_{name.upper()}": str(value) for name, value in environment.items()}
    return subprocess.run(
        [sys.executable, "-m", "loramux_worker", *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_commands_take_the_same_settings(secured: Secured) -> None:
    names = ("requests_topic", "replies_topic", "stream_topic")
    topics = {name: secured.topics[name] for name in names}
    right = settings(secured.cluster, "SCRAM-SHA-256")
    asked = loramux(["send", "hello", "-n", "2", "--json", "-H", "tenant=acme"], {**right, **topics})
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["status"] == "ok"
    refused = loramux(["send", "hello"], {**right, **topics, "sasl_password": "h7nter2"})
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("loramux: Kafka refuses this client: ")
    serve = ["worker", "--model", str(secured.model.path), "--startup-timeout", "60s"]
    worker = loramux(serve, {**right, **topics, "sasl_password": "h7nter2"})
    assert worker.returncode == 2
    assert worker.stderr.splitlines()[-1].startswith("loramux: --bootstrap-servers: 127.0.0.1:")
    assert "refuses user 'alice' by SCRAM-SHA-256" in worker.stderr
    assert "h7nter2" not in refused.stderr + worker.stderr


def test_no_secret_is_in_logs_and_metrics(secured: Secured) -> None:
    """After all that was asked above, at level debug; the engine's lines are in the same log."""
    assert secured.cluster.security is not None
    log, metrics = secured.worker.log_path.read_text(), secured.worker.get("/metrics")
    assert "worker_ready" in log
    for secret in ("h7nter2", *secured.cluster.security.users.values()):
        assert secret not in log + metrics
        assert json.dumps(secret)[1:-1] not in log
