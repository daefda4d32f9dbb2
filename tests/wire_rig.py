"""Who knocks at a secured broker, for tests, and a worker behind it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from loramux_producer import Client
from loramux_schemas import KafkaConnection
from services.kafka import KafkaCluster
from services.kafka_security import unsigned_token
from services.worker import WorkerProcess
from tiny_models import TinyModel


@dataclass(frozen=True)
class Token:
    """A provider of unsigned tokens."""

    lifetime: float = 60.0
    scope: str = "kafka"

    async def token(self) -> str:
        return unsigned_token(self.lifetime, scope=self.scope)


def settings(cluster: KafkaCluster, mechanism: str = "SCRAM-SHA-512", **changes: Any) -> dict[str, Any]:
    """Settings that the broker takes, and what is changed of them; None removes one."""
    security = cluster.security
    assert security is not None
    right: dict[str, Any] = {"ssl_cafile": str(security.ca_file)}
    if mechanism == "mutual TLS":
        right |= {"bootstrap_servers": cluster.servers("SSL"), "security_protocol": "SSL"}
        right |= {"ssl_certfile": str(security.client_file)}
    else:
        right |= {"bootstrap_servers": cluster.servers("SASL_SSL"), "security_protocol": "SASL_SSL"}
        right |= {"sasl_mechanism": mechanism}
        if mechanism == "OAUTHBEARER":
            right |= {"sasl_oauth_token_provider": Token()}
        else:
            right |= {"sasl_username": "alice", "sasl_password": security.users["alice"]}
    return {name: value for name, value in {**right, **changes}.items() if value is not None}


class TokenEndpoint(BaseHTTPRequestHandler):
    """Gives tokens that live for a second and a half."""

    server: Any

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.given += 1
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"access_token": unsigned_token(1.5), "expires_in": 1.5}).encode())

    def log_message(self, *_: Any) -> None:
        """Silence."""


@dataclass(frozen=True)
class Secured:
    """A worker that is reached by TLS and SCRAM, and decides by tenants."""

    cluster: KafkaCluster
    worker: WorkerProcess
    model: TinyModel
    topics: dict[str, str]
    tenants: Path

    def client(self, mechanism: str = "SCRAM-SHA-256", **options: Any) -> Client:
        """A client of a tenant or of none, not started."""
        names = ("requests_topic", "replies_topic", "stream_topic")
        topics = {name: self.topics[name] for name in names}
        return Client(
            connection=KafkaConnection(**settings(self.cluster, mechanism)), **topics, timeout=60.0, **options
        )
