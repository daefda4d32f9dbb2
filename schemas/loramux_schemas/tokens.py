"""Bearer tokens for Kafka's OAUTHBEARER: from an OAuth 2 token endpoint, from AWS, or from a provider of one's own.

KafkaError
├── SaslAuthenticationFailed   the source refuses us: a person must change something
└── KafkaConnectionError       the source does not answer: aiokafka tries again, as with a broker that is away
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import logging
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Final, NamedTuple
from urllib.parse import quote_plus, urlencode, urlsplit

import orjson
from aiokafka.abc import AbstractTokenProvider
from aiokafka.errors import KafkaConnectionError, KafkaError, SaslAuthenticationFailed
from pydantic import SecretStr

from loramux_schemas.connection import TokenProvider
from loramux_schemas.errors import printable

USED_SHARE: Final = 0.8  # of a token's life, then a new one is asked for: Kafka's sasl.login.refresh.window.factor
RETRY_SECONDS: Final = 5.0  # until a source that failed is asked again, while there is a token that is still valid
DEFAULT_LIFETIME: Final = 60.0  # seconds, of a token whose endpoint says nothing (RFC 6749 §5.1 only recommends it)
ENDPOINT_SECONDS: Final = 10.0
MAX_ANSWER_BYTES: Final = 1 << 20

log = logging.getLogger(__name__)


class Token(NamedTuple):
    """A bearer token and how long it is valid, in seconds from when it was asked for."""

    value: str
    lifetime: float


class KeptToken:
    """A token provider that keeps what `fetch` gives for USED_SHARE of its life; safe in any thread or event loop.

    While the source fails, a token that is still valid goes on being used. `fetch` may block; it raises KafkaError.
    """

    def __init__(self, fetch: Callable[[], Token], clock: Callable[[], float] = time.monotonic) -> None:
        self._fetch = fetch
        self._clock = clock
        self._lock = threading.Lock()
        self._value: str | None = None
        self._refresh_at = self._expires_at = float("-inf")

    async def token(self) -> str:
        """A valid token. Raises KafkaError."""
        value = self._value
        if value is not None and self._clock() < self._refresh_at:
            return value
        return await asyncio.to_thread(self._renewed)

    def _renewed(self) -> str:
        with self._lock:  # the others wait for the first one's token
            now = self._clock()
            if self._value is not None and now < self._refresh_at:
                return self._value
            try:
                fresh = self._fetch()
            except KafkaError as error:
                if self._value is None or self._clock() >= self._expires_at:
                    raise
                log.warning("the token of Kafka's SASL OAUTHBEARER could not be renewed: %s", error)
                self._refresh_at = self._clock() + RETRY_SECONDS
                return self._value
            self._value = fresh.value
            self._refresh_at, self._expires_at = now + USED_SHARE * fresh.lifetime, now + fresh.lifetime
            return self._value


class BearerTokens(AbstractTokenProvider):  # type: ignore[misc] # aiokafka is untyped
    """A token provider as aiokafka takes it.

    aiokafka's background tasks survive KafkaError alone, so whatever else the provider raises becomes one.
    """

    def __init__(self, provider: TokenProvider) -> None:
        self._provider = provider

    async def token(self) -> str:
        """A token for one connection. Raises KafkaError."""
        try:
            return await self._provider.token()
        except KafkaError:
            raise
        except Exception as error:
            # Without the error's own text: nobody knows what a provider puts into it.
            raise KafkaConnectionError(f"the token provider failed: {type(error).__name__}") from error


class ClientCredentials:
    """The client-credentials grant (RFC 6749 §4.4), the client authenticated by HTTP Basic (§2.3.1)."""

    def __init__(self, url: str, client_id: str, secret: SecretStr, scope: str | None) -> None:
        self._url = url
        self._client_id = client_id
        self._secret = secret
        self._scope = scope
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __call__(self) -> Token:
        """A new token. Raises SaslAuthenticationFailed or KafkaConnectionError."""
        try:
            with self._opener.open(self._request(), timeout=ENDPOINT_SECONDS) as response:
                answer = _fields(response.read(MAX_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error.code, _fields(error.read(MAX_ANSWER_BYTES))) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise SaslAuthenticationFailed(
                    f"{self._place}: its certificate is not trusted ({reason.verify_message}): "
                    "name its authority with SSL_CERT_FILE"
                ) from None
            raise KafkaConnectionError(f"{self._place} does not answer: {reason}") from None
        value, lifetime = answer.get("access_token"), answer.get("expires_in")
        if not isinstance(value, str) or not value.isascii() or not value.isprintable():
            raise SaslAuthenticationFailed(f"{self._place} answered without an access_token")
        known = isinstance(lifetime, int | float) and lifetime > 0
        return Token(value, float(lifetime) if known else DEFAULT_LIFETIME)  # type: ignore[arg-type]

    @property
    def _place(self) -> str:
        url = urlsplit(self._url)
        return f"sasl_oauthbearer_token_endpoint_url: {url.scheme}://{url.netloc}{url.path}"

    def _request(self) -> urllib.request.Request:
        form = {"grant_type": "client_credentials"} | ({"scope": self._scope} if self._scope else {})
        pair = f"{quote_plus(self._client_id)}:{quote_plus(self._secret.get_secret_value())}"
        return urllib.request.Request(  # noqa: S310 - the settings take http and https alone
            self._url,
            data=urlencode(form).encode(),
            headers={
                "Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}",
                "Content-Type": "application/x-www-form-urlencoded",
                "Accept": "application/json",
            },
        )

    def _refused(self, status: int, answer: dict[str, Any]) -> KafkaError:
        said = [str(answer[name]) for name in ("error", "error_description") if answer.get(name)]
        # An endpoint that repeats what it was sent must not bring the secret into a log.
        text = ": ".join(said).replace(self._secret.get_secret_value(), "…")
        reason = f"{self._place} answered {status}" + (f" ({printable(text, limit=200)})" if text else "")
        transient = status in (408, 429) or status >= 500
        return KafkaConnectionError(reason) if transient else SaslAuthenticationFailed(reason)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nothing: urllib would take the Authorization header along, to any host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """No request: the redirect itself becomes the answer, and so an error."""


def msk_iam(region: str) -> Callable[[], Token]:
    """Signs tokens for Amazon MSK with the AWS credentials of the environment.

    Raises `ValueError` where the signer is not installed.
    """
    try:
        from aws_msk_iam_sasl_signer import MSKAuthTokenProvider
    except ModuleNotFoundError:
        raise ValueError(
            "sasl_mechanism AWS_MSK_IAM: aws-msk-iam-sasl-signer-python is missing: pip install 'loramux[msk]'"
        ) from None

    def sign() -> Token:
        try:
            value, expires_ms = MSKAuthTokenProvider.generate_auth_token(region)
        except Exception as error:  # botocore's and the signer's own have no common base
            # No text of botocore's: it can hold parts of credential files.
            raise SaslAuthenticationFailed(
                f"AWS_MSK_IAM: no token with the AWS credentials of this machine ({type(error).__name__})"
            ) from None
        return Token(value, expires_ms / 1000 - time.time())

    return sign


def _fields(body: bytes) -> dict[str, Any]:
    """The JSON object of an answer; empty when it is none."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return answer if isinstance(answer, dict) else {}
