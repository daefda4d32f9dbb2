from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from pydantic import ValidationError

from loramux_schemas import KafkaConnection, describe


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
        sasl_password="secret",  # type: ignore[arg-type]
    )
    assert "secret" not in repr(connection)
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
        "sasl_plain_password": "secret",
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
        ({"server": "x"}, "server"),
    ],
)
def test_settings_that_cannot_work_are_named_in_one_line(settings: dict[str, str], name: str) -> None:
    with pytest.raises(ValidationError) as caught:
        KafkaConnection(**settings)  # type: ignore[arg-type]
    line = describe(caught.value)
    assert name in line
    assert line.isprintable()


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    for path in (str(broken), str(tmp_path / "missing.pem")):
        with pytest.raises(ValueError, match=r"^ssl_cafile: "):
            KafkaConnection(security_protocol="SSL", ssl_cafile=path).client_options()
        with pytest.raises(ValueError, match=r"^ssl_certfile: "):
            KafkaConnection(security_protocol="SSL", ssl_certfile=path).client_options()
