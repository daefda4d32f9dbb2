"""How to reach Kafka: the settings that every client of ours shares."""

from __future__ import annotations

import ssl
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator


class KafkaConnection(BaseModel):
    """Servers and credentials, in Kafka's own words; raises `ValidationError` naming the setting."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bootstrap_servers: str = Field(default="localhost:9092", description="host:port, comma-separated")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    sasl_username: str | None = None
    sasl_password: SecretStr | None = None
    ssl_cafile: str | None = Field(default=None, description="PEM file with the authorities; the system's if not set")
    ssl_certfile: str | None = Field(default=None, description="PEM file with the client's certificate")
    ssl_keyfile: str | None = Field(default=None, description="PEM file with the client's key")

    @field_validator("bootstrap_servers")
    @classmethod
    def _are_addresses(cls, value: str) -> str:
        servers = [server.strip() for server in value.split(",")]
        for server in servers:
            host, _, port = server.rpartition(":")
            if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
                raise ValueError(f"'{server}' is not host:port")
        return ",".join(servers)

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        has_sasl = self.security_protocol.startswith("SASL")
        has_ssl = self.security_protocol.endswith("SSL")
        if has_sasl and (self.sasl_username is None or self.sasl_password is None):
            raise ValueError(f"security_protocol {self.security_protocol} needs sasl_username and sasl_password")
        if not has_sasl and (self.sasl_username is not None or self.sasl_password is not None):
            raise ValueError(f"sasl_username is set, but security_protocol is {self.security_protocol}")
        for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
            if getattr(self, name) is not None and not has_ssl:
                raise ValueError(f"{name} is set, but security_protocol is {self.security_protocol}")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError("ssl_keyfile is set without ssl_certfile")
        return self

    def client_options(self) -> dict[str, Any]:
        """Keyword arguments for any aiokafka client; raises `ValueError` naming a file that is unreadable."""
        options: dict[str, Any] = {
            "bootstrap_servers": self.bootstrap_servers,
            "security_protocol": self.security_protocol,
        }
        if self.security_protocol.startswith("SASL"):
            options["sasl_mechanism"] = self.sasl_mechanism
            options["sasl_plain_username"] = self.sasl_username
            options["sasl_plain_password"] = self.sasl_password.get_secret_value() if self.sasl_password else None
        if self.security_protocol.endswith("SSL"):
            options["ssl_context"] = self._ssl_context()
        return options

    def _ssl_context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.ssl_cafile)
        except OSError as error:  # ssl.SSLError is one too
            raise ValueError(f"ssl_cafile: cannot read {self.ssl_cafile}: {_reason(error)}") from None
        if self.ssl_certfile is not None:
            try:
                context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
            except OSError as error:
                names = "ssl_certfile" if self.ssl_keyfile is None else "ssl_certfile or ssl_keyfile"
                raise ValueError(f"{names}: cannot read {self.ssl_certfile}: {_reason(error)}") from None
        return context


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
