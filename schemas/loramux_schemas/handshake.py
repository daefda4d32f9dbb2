"""Why a broker cannot be used: aiokafka logs it and raises "unable to bootstrap" for everything.

So after a failure one connection is made by hand, step by step, and the step that fails says what is wrong. What
will not get better by itself is a `Diagnosis` that is permanent: a wrong password, an authority that is not trusted,
a listener that speaks another protocol.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import aiokafka.conn
from aiokafka.conn import AIOKafkaConnection, OAuthAuthenticator, collect_hosts
from aiokafka.errors import (
    IllegalSaslStateError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)
from aiokafka.protocol.admin import SaslAuthenticateRequest
from aiokafka.protocol.metadata import MetadataRequest

from loramux_schemas.connection import KafkaConnection
from loramux_schemas.errors import printable

STEP_SECONDS: Final = 5.0
CLOSE_SECONDS: Final = 1.0
MAX_REASON_CHARS: Final = 300

# A TLS alert (content type 21, version 3.x), read as the length of a Kafka response.
_TLS_ALERT_LENGTHS: Final = range(0x15030000, 0x15040000)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why no broker could be used: one line without secrets, and whether only a person can change that."""

    reason: str
    permanent: bool


async def diagnose(connection: KafkaConnection) -> Diagnosis | None:
    """Tries each server until one says why it cannot be used; None when one can be used now.

    Takes some seconds where servers are silent; where they refuse, none. Raises `ValueError` as `client_options`.
    """
    options = connection.client_options()
    hosts = collect_hosts(options.pop("bootstrap_servers"), randomize=False)
    found: Diagnosis | None = None
    for host, port, _ in hosts:
        found = await _try(host, port, connection, options)
        if found is None or found.permanent:
            break
    return found


def prepare_sasl() -> None:
    """Mends what aiokafka does wrong with credentials, for all clients of this process; a second time it does nothing.

    At level DEBUG it logs every request, those that carry passwords and tokens too. And it overlooks that a token was
    refused, and then takes the broker's complaint for the answer to its next request: a cluster without brokers.
    """
    logging.getLogger("aiokafka.conn").addFilter(_has_no_credentials)
    aiokafka.conn.OAuthAuthenticator = _AttentiveAuthenticator


def _has_no_credentials(record: logging.LogRecord) -> bool:
    arguments = record.args if isinstance(record.args, tuple) else ()
    return not any(getattr(argument, "API_KEY", None) == SaslAuthenticateRequest.API_KEY for argument in arguments)


async def _try(host: str, port: int, connection: KafkaConnection, options: dict[str, Any]) -> Diagnosis | None:
    probe = _Probe(host, port, request_timeout_ms=int(STEP_SECONDS * 1000), **options)
    try:
        await probe.connect()
        probe.step = "ask"
        await probe.send(MetadataRequest([]))
        return None
    except (KafkaError, OSError, TimeoutError) as error:
        return _explain(error, probe.step, f"{host}:{port}", connection)
    finally:
        if probe._protocol is not None:  # it was connected; connect() closes what it gives up, and does not wait
            await asyncio.wait([probe.close()], timeout=CLOSE_SECONDS)


class _Probe(AIOKafkaConnection):  # type: ignore[misc] # aiokafka is untyped
    """One connection that remembers how far it came: connect, greet, authenticate, ask."""

    step = "connect"

    async def _do_version_lookup(self) -> None:
        self.step = "greet"
        await super()._do_version_lookup()

    async def _do_sasl_handshake(self) -> None:
        self.step = "authenticate"
        await super()._do_sasl_handshake()


class _AttentiveAuthenticator(OAuthAuthenticator):  # type: ignore[misc] # aiokafka is untyped
    """Reads the answer to a token: empty, or why the broker does not take it (RFC 7628 §3.2.2)."""

    async def step(self, payload: bytes | None) -> Any:
        if payload:
            raise SaslAuthenticationFailed(payload.decode(errors="replace"))
        return await super().step(payload)


def _explain(error: BaseException, step: str, server: str, connection: KafkaConnection) -> Diagnosis:
    protocol, mechanism = connection.security_protocol, connection.sasl_mechanism
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            hint = "" if "mismatch" in cause.verify_message else ": is ssl_cafile its authority?"
            return _permanent(server, f"its certificate is not trusted ({cause.verify_message.rstrip('.')}){hint}")
        if isinstance(cause, ssl.SSLError):
            return _permanent(server, _tls_reason(cause, connection))
        if isinstance(cause, asyncio.IncompleteReadError) and cause.expected in _TLS_ALERT_LENGTHS:
            return _permanent(server, f"it speaks TLS, and security_protocol is {protocol}: SSL or SASL_SSL?")
    if isinstance(error, SaslAuthenticationFailed):
        own_words = str(error.args[0]) if error.args and error.args[0] else "the broker gives no reason"
        who = f"user '{connection.sasl_username}'" if connection.sasl_username is not None else "the token"
        return _permanent(server, f"it refuses {who} by {mechanism}: {own_words}")
    if isinstance(error, UnsupportedSaslMechanismError):
        return _permanent(server, f"it does not take sasl_mechanism {mechanism}: {error.args[0] if error.args else ''}")
    if isinstance(error, IllegalSaslStateError):
        return _permanent(server, f"it does no SASL here, and security_protocol is {protocol}")
    if step == "ask" and any(isinstance(cause, EOFError | ConnectionError) for cause in causes):
        return _permanent(server, f"it ends the connection at the first request: is {protocol} its security_protocol?")
    hint = ""
    if step in ("connect", "greet") and any(isinstance(c, EOFError | ConnectionResetError) for c in causes):
        hint = f"; is {protocol} its security_protocol?"
    text = printable(str(error) or type(error).__name__, limit=MAX_REASON_CHARS)
    return Diagnosis(f"{server}: {text}{hint}", permanent=False)


def _tls_reason(error: ssl.SSLError, connection: KafkaConnection) -> str:
    name = (error.reason or str(error)).replace("_", " ").lower()
    if "alert" in name and connection.ssl_certfile is None:
        return f"it ends the TLS handshake ({name}): does it want ssl_certfile and ssl_keyfile?"
    if "alert" in name:
        return f"it does not take the certificate of ssl_certfile ({name})"
    return f"no TLS with it ({name}): is {connection.security_protocol} its security_protocol?"


def _permanent(server: str, reason: str) -> Diagnosis:
    return Diagnosis(f"{server}: {printable(reason, limit=MAX_REASON_CHARS)}", permanent=True)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
