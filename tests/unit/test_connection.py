from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from pydantic import ValidationError

from loramux_schemas import KafkaConnection, describe

OAUTH = {
    "security_protocol": "SASL_SSL",
    "sasl_mechanism": "OAUTHBEARER",
    "sasl_oauthbearer_token_endpoint_url": "https://idp.example/token",
    "sasl_oauthbearer_client_id": "worker",
    "sasl_oauthbearer_client_secret": "hunter2",
}


def test_defaults() -> None:
    assert KafkaConnection().client_options() == {
        "bootstrap_servers": "localhost:9092",
        "security_protocol": "PLAINTEXT",
    }


def test_several_servers() -> None:
    connection = KafkaConnection(bootstrap_servers="a:1, [::1]:2")
    assert connection.client_options()["bootstrap_servers"] == "a:1,[::1]:2"


def test_sasl_over_tls() -> None:
    connection = KafkaConnection(
        security_protocol="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_username="me",
        sasl_password="hunter2",  # type: ignore[arg-type]
    )
    options = connection.client_options()
    context = options.pop("ssl_context")
    assert isinstance(context, ssl.SSLContext)
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert options == {
        "bootstrap_servers": "localhost:9092",
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "me",
        "sasl_plain_password": "hunter2",
    }


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"bootstrap_servers": ""}, "bootstrap_servers"),
        ({"bootstrap_servers": "host"}, "bootstrap_servers"),
        ({"bootstrap_servers": "host:port"}, "bootstrap_servers"),
        ({"bootstrap_servers": "host:70000"}, "bootstrap_servers"),
        ({"bootstrap_servers": "a:1,,b:2"}, "bootstrap_servers"),
        ({"security_protocol": "TLS"}, "security_protocol"),
        ({"security_protocol": "SASL_SSL", "sasl_username": "me"}, "sasl_password"),
        ({"sasl_username": "me", "sasl_password": "p"}, "sasl_username"),
        ({"ssl_cafile": "/x"}, "ssl_cafile"),
        ({"security_protocol": "SSL", "ssl_keyfile": "/x"}, "ssl_keyfile"),
        ({"sasl_mechanism": "GSSAPI"}, "sasl_mechanism"),
        ({**OAUTH, "sasl_oauthbearer_client_secret": None}, "sasl_oauthbearer_client_secret"),
        ({**OAUTH, "sasl_username": "me"}, "sasl_username"),
        ({**OAUTH, "sasl_oauthbearer_token_endpoint_url": "http://idp.example/token"}, "use https://"),
        ({**OAUTH, "sasl_oauthbearer_token_endpoint_url": "https://me:hunter2@idp.example/"}, "may hold no user"),
        ({**OAUTH, "sasl_oauthbearer_token_endpoint_url": "idp.example/token"}, "sasl_oauthbearer_token_endpoint_url"),
        ({**OAUTH, "sasl_oauth_token_provider": "a token"}, "sasl_oauth_token_provider"),
        (
            {**OAUTH, "sasl_mechanism": "PLAIN"},
            "sasl_oauthbearer_token_endpoint_url is set, but sasl_mechanism is PLAIN",
        ),
        ({"security_protocol": "SASL_SSL", "sasl_mechanism": "AWS_MSK_IAM"}, "sasl_aws_region"),
        (
            {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "AWS_MSK_IAM", "sasl_aws_region": "eu-west-1"},
            "SASL_SSL",
        ),
        ({"sasl_oauthbearer_scope": "kafka"}, "sasl_oauthbearer_scope"),
        ({"server": "x"}, "server"),
    ],
)
def test_settings_that_cannot_work_are_named_in_one_line(
    settings: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValidationError) as caught:
        KafkaConnection(**settings)  # type: ignore[arg-type]
    line = describe(caught.value)
    assert name in line
    assert line.isprintable()
    assert "hunter2" not in str(caught.value) + line


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    for path in (str(broken), str(tmp_path / "missing.pem")):
        with pytest.raises(ValueError, match=r"^ssl_cafile: "):
            KafkaConnection(security_protocol="SSL", ssl_cafile=path).client_options()
        with pytest.raises(ValueError, match=r"^ssl_certfile: "):
            KafkaConnection(security_protocol="SSL", ssl_certfile=path).client_options()
