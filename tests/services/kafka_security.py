"""What a broker of the tests needs to be reached by TLS and SASL: an authority of its own, users, listeners.

    with KafkaCluster(security=WireSecurity(folder)) as kafka:
        … KafkaConnection(bootstrap_servers=kafka.servers("SASL_SSL"), security_protocol="SASL_SSL",
                          ssl_cafile=kafka.security.ca_file, sasl_username="alice", …) …

`SASL_SSL` takes every mechanism, `SSL` wants a certificate of the same authority (mutual TLS). OAUTHBEARER takes
unsigned tokens (Kafka's own validator for development) that have the scope `kafka`.
"""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path

import trustme
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

LISTENERS = ("SASL_SSL", "SSL")
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER")
SCOPE = "kafka"

_MODULES = "org.apache.kafka.common.security"


class WireSecurity:
    """Certificates under `folder` and the users of one cluster, name → password."""

    def __init__(self, folder: Path) -> None:
        self.users = {"alice": "alice's word: 5%=+/"}
        self.ca_file = folder / "ca.pem"
        self.client_file = folder / "client.pem"
        self.stranger_file = folder / "stranger.pem"
        self._broker_file = folder / "broker.pem"
        authority, stranger = trustme.CA(), trustme.CA()
        authority.cert_pem.write_to_path(self.ca_file)
        stranger.cert_pem.write_to_path(self.stranger_file)
        _write_pem(authority.issue_cert("127.0.0.1"), self._broker_file)
        _write_pem(authority.issue_cert("alice@example.org"), self.client_file)

    @property
    def broker_properties(self) -> dict[str, object]:
        """Lines of a broker's configuration."""
        plain = " ".join(f'user_{name}="{password}"' for name, password in self.users.items())
        jaas = {
            "plain": f"{_MODULES}.plain.PlainLoginModule required {plain};",
            "scram-sha-256": f"{_MODULES}.scram.ScramLoginModule required;",
            "scram-sha-512": f"{_MODULES}.scram.ScramLoginModule required;",
            "oauthbearer": f"{_MODULES}.oauthbearer.OAuthBearerLoginModule required "
            f'unsecuredLoginStringClaim_sub="broker" unsecuredValidatorRequiredScope="{SCOPE}";',
        }
        return {
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": self._broker_file,
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": self.ca_file,
            "listener.name.ssl.ssl.client.auth": "required",
            "listener.name.sasl_ssl.sasl.enabled.mechanisms": ",".join(MECHANISMS),
            **{f"listener.name.sasl_ssl.{name}.sasl.jaas.config": line for name, line in jaas.items()},
        }

    @property
    def scram_arguments(self) -> list[str]:
        """Arguments of `StorageTool format` that make the users known."""
        return [
            argument
            for name, password in self.users.items()
            for mechanism in MECHANISMS
            if mechanism.startswith("SCRAM")
            for argument in ("--add-scram", f'{mechanism}=[name="{name}",password="{password}"]')
        ]


def unsigned_token(lifetime: float, subject: str = "alice", scope: str = SCOPE) -> str:
    """A JSON Web Token without a signature that is valid for `lifetime` seconds."""
    now = time.time()
    claims = {"sub": subject, "scope": scope, "iat": now, "exp": now + lifetime}
    parts = ({"alg": "none"}, claims)
    return ".".join(base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts) + "."


def _write_pem(leaf: trustme.LeafCert, path: Path) -> None:
    """Key and chain in one file; Java reads keys in PKCS #8 only."""
    key = load_pem_private_key(leaf.private_key_pem.bytes(), None)
    path.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        + b"".join(pem.bytes() for pem in leaf.cert_chain_pems)
    )
