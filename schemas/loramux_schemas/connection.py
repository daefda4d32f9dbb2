"""How to reach Kafka: the settings that every client of ours shares."""

from __future__ import annotations

import os
import ssl
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, Self, runtime_checkable
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic.fields import FieldInfo

if TYPE_CHECKING:
    from loramux_schemas.tokens import BearerTokens

# What each mechanism asks for; a token provider of one's own stands for all that OAUTHBEARER asks for.
_PASSWORD: Final = ("sasl_username", "sasl_password")
_CLIENT: Final = (
    "sasl_oauthbearer_token_endpoint_url",
    "sasl_oauthbearer_client_id",
    "sasl_oauthbearer_client_secret",
)
_NEEDED: Final = {
    "PLAIN": _PASSWORD,
    "SCRAM-SHA-256": _PASSWORD,
    "SCRAM-SHA-512": _PASSWORD,
    "OAUTHBEARER": _CLIENT,
    "AWS_MSK_IAM": ("sasl_aws_region",),
}
_OPTIONAL: Final = {"OAUTHBEARER": ("sasl_oauthbearer_scope", "sasl_oauth_token_provider")}
_CREDENTIALS: Final = frozenset(name for names in (*_NEEDED.values(), *_OPTIONAL.values()) for name in names)
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


@runtime_checkable
class TokenProvider(Protocol):
    """Gives a bearer token that is valid now, whenever a connection is made; keeping it meanwhile is its own matter."""

    async def token(self) -> str:
        """The token; what this raises counts as a broker that cannot be reached."""


class KafkaConnection(BaseModel):
    """Servers and credentials, in Kafka's own words; raises `ValidationError` naming the setting."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, arbitrary_types_allowed=True)

    bootstrap_servers: str = Field(default="localhost:9092", description="Kafka brokers, host:port separated by commas")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        default="PLAINTEXT", description="PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER", "AWS_MSK_IAM"] = Field(
        default="PLAIN", description="PLAIN, SCRAM-SHA-256, SCRAM-SHA-512, OAUTHBEARER or AWS_MSK_IAM"
    )
    sasl_username: str | None = Field(default=None, description="user of PLAIN and SCRAM")
    sasl_password: SecretStr | None = Field(
        default=None, description="password of PLAIN and SCRAM; better from the environment"
    )
    sasl_oauthbearer_token_endpoint_url: str | None = Field(
        default=None, description="where OAUTHBEARER gets tokens: an OAuth 2 token endpoint (client credentials)"
    )
    sasl_oauthbearer_client_id: str | None = Field(default=None, description="client id at the token endpoint")
    sasl_oauthbearer_client_secret: SecretStr | None = Field(
        default=None, description="its secret; better from the environment"
    )
    sasl_oauthbearer_scope: str | None = Field(default=None, description="scope to ask the token endpoint for")
    sasl_aws_region: str | None = Field(
        default=None, description="region of the cluster for AWS_MSK_IAM; AWS_REGION if not set"
    )
    ssl_cafile: str | None = Field(
        default=None, description="PEM file of the authorities that sign the brokers; the system's if not set"
    )
    ssl_certfile: str | None = Field(default=None, description="PEM file of this client's certificate")
    ssl_keyfile: str | None = Field(default=None, description="PEM file of this client's key")
    sasl_oauth_token_provider: TokenProvider | None = Field(
        default=None, exclude=True, repr=False, description="source of OAUTHBEARER's tokens, from code alone"
    )

    @classmethod
    def settings(cls) -> dict[str, FieldInfo]:
        """What a person can set by a flag or a variable: every field but those that only code can give."""
        return {name: field for name, field in cls.model_fields.items() if not field.exclude}

    @field_validator("bootstrap_servers")
    @classmethod
    def _are_addresses(cls, value: str) -> str:
        servers = [server.strip() for server in value.split(",")]
        for server in servers:
            host, _, port = server.rpartition(":")
            if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
                raise ValueError(f"'{server}' is not host:port")
        return ",".join(servers)

    @field_validator("sasl_oauthbearer_token_endpoint_url")
    @classmethod
    def _keeps_the_secret(cls, value: str | None) -> str | None:
        if value is not None:
            url = urlsplit(value)
            if not url.hostname or url.scheme not in ("http", "https"):
                raise ValueError("is not the URL of a token endpoint, https://host/path")
            if url.username is not None or url.password is not None:
                raise ValueError("may hold no user and no password: give sasl_oauthbearer_client_id and its secret")
            if url.scheme == "http" and url.hostname not in _LOOPBACK:
                raise ValueError("would send the client's secret in the clear: use https://")
        return value

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        has_ssl = self.security_protocol.endswith("SSL")
        for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
            if getattr(self, name) is not None and not has_ssl:
                raise ValueError(f"{name} is set, but security_protocol is {self.security_protocol}")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError("ssl_keyfile is set without ssl_certfile")
        self._check_sasl()
        return self

    def _check_sasl(self) -> None:
        protocol, mechanism = self.security_protocol, self.sasl_mechanism
        has_sasl = protocol.startswith("SASL")
        needed = _NEEDED[mechanism] if self.sasl_oauth_token_provider is None else ()
        usable = (*needed, *_OPTIONAL.get(mechanism, ())) if has_sasl else ()
        for name in (field for field in type(self).model_fields if field in _CREDENTIALS and field not in usable):
            if getattr(self, name) is not None:
                setting = f"sasl_mechanism is {mechanism}" if has_sasl else f"security_protocol is {protocol}"
                raise ValueError(f"{name} is set, but {setting}")
        if not has_sasl:
            return
        if mechanism == "AWS_MSK_IAM":
            if protocol != "SASL_SSL":
                raise ValueError("sasl_mechanism AWS_MSK_IAM needs security_protocol SASL_SSL")
            if self.aws_region is None:
                raise ValueError("sasl_mechanism AWS_MSK_IAM needs sasl_aws_region (or AWS_REGION)")
        elif any(getattr(self, name) is None for name in needed):
            raise ValueError(
                f"security_protocol {protocol} with sasl_mechanism {mechanism} needs "
                + " and ".join(needed).replace(" and ", ", ", len(needed) - 2)
            )

    @property
    def aws_region(self) -> str | None:
        """The region of an MSK cluster: as set, or where the machine says it is."""
        return self.sasl_aws_region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")

    def client_options(self) -> dict[str, Any]:
        """Keyword arguments for any aiokafka client.

        Raises `ValueError` naming a file that is unreadable or a package that is not installed.
        """
        options: dict[str, Any] = {
            "bootstrap_servers": self.bootstrap_servers,
            "security_protocol": self.security_protocol,
        }
        if self.security_protocol.startswith("SASL"):
            options.update(self._sasl_options())
        if self.security_protocol.endswith("SSL"):
            options["ssl_context"] = self._ssl_context()
        return options

    def _sasl_options(self) -> dict[str, Any]:
        from loramux_schemas.handshake import prepare_sasl  # aiokafka: not for who only reads messages

        prepare_sasl()
        if self.sasl_mechanism in ("OAUTHBEARER", "AWS_MSK_IAM"):
            # MSK takes its signed requests as bearer tokens: what the Java client calls AWS_MSK_IAM has a wire form
            # of its own there.
            return {"sasl_mechanism": "OAUTHBEARER", "sasl_oauth_token_provider": self._tokens}
        return {
            "sasl_mechanism": self.sasl_mechanism,
            "sasl_plain_username": self.sasl_username,
            "sasl_plain_password": self.sasl_password.get_secret_value() if self.sasl_password else None,
        }

    @cached_property
    def _tokens(self) -> BearerTokens:
        """One for all clients of this connection, so that they share a token."""
        from loramux_schemas import tokens

        if self.sasl_oauth_token_provider is not None:
            return tokens.BearerTokens(self.sasl_oauth_token_provider)
        if self.sasl_mechanism == "AWS_MSK_IAM":
            return tokens.BearerTokens(tokens.KeptToken(tokens.msk_iam(self.aws_region or "")))
        url, client_id, secret = (getattr(self, name) for name in _CLIENT)
        fetch = tokens.ClientCredentials(url, client_id, secret, self.sasl_oauthbearer_scope)
        return tokens.BearerTokens(tokens.KeptToken(fetch))

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
