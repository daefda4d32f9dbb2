"""Every mistake of a person is one line and exit code 2."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from loramux_worker import cli
from loramux_worker.errors import ConfigurationError
from loramux_worker.settings_sources import load_settings


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["loramux", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--model is required"),
        (["--model", "/no/such/folder"], "--model '/no/such/folder'"),
        (["--model", "m", "--no-such-flag", "1"], "--no-such-flag"),
        (["--model", "m", "--dtype", "int3"], "--dtype"),
        (["--model", "m", "--block-size", "0"], "--block-size"),
        (["--model", "m", "--kv-cache-memory", "plenty"], "--kv-cache-memory"),
        (["--model", "m", "--drain-timeout", "soon"], "--drain-timeout"),
        (["--model", "m", "--adapters", "a,../b"], "--adapters"),
        (["--model", "m", "--delivery", "maybe"], "--delivery"),
        (["--model", "m", "--config", "/no/such/file.toml"], "--config"),
        (["--model", "m", "--security-protocol", "SASL_SSL"], "sasl_username"),
        (["--model", "m", "--bootstrap-servers", "nowhere"], "bootstrap-servers"),
    ],
)
def test_a_wrong_setting_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert run(monkeypatch, "worker", *arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert len(error.strip().splitlines()) == 1


def test_flags_go_before_the_environment_and_that_before_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "loramux.toml"
    file.write_text('model = "m"\ngroup_id = "file"\nlook_ahead = 7\nrequests_topic = "file"\nhost_memory = "2GiB"\n')
    monkeypatch.setenv("LORAMUX_CONFIG", str(file))
    monkeypatch.setenv("LORAMUX_GROUP_ID", "environment")
    monkeypatch.setenv("LORAMUX_REQUESTS_TOPIC", "environment")
    settings = load_settings(["--requests-topic", "flag"])
    assert settings.look_ahead == 7
    assert settings.group_id == "environment"
    assert settings.requests_topic == "flag"
    assert settings.host_memory == 2 << 30


def test_an_unknown_key_in_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "loramux.toml"
    file.write_text('model = "m"\nlook_ahaed = 7\n')
    with pytest.raises(ConfigurationError, match="--look-ahaed: there is no such setting"):
        load_settings(["--config", str(file)])


def test_preloaded_adapters_come_from_either_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_ADAPTERS", "a/1, b/2")
    assert load_settings(["--model", "m"]).adapters == ("a/1", "b/2")
    monkeypatch.setenv("LORAMUX_ADAPTERS", "c")
    assert load_settings(["--model", "m"]).adapters == ("c",)


def test_a_password_is_never_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LORAMUX_SASL_PASSWORD", "hunter2")
    assert run(monkeypatch, "worker", "--model", "m", "--sasl-username", "u") == 2
    shown = capsys.readouterr()
    assert "hunter2" not in shown.err + shown.out


def test_help_names_every_setting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "worker", "--help") == 0
    shown = capsys.readouterr().out
    for flag in ("--model", "--adapter-uri", "--max-batch-ranks", "--drain-timeout", "--sasl-mechanism"):
        assert flag in shown


@pytest.mark.parametrize("document", ["json-schema", "asyncapi"])
def test_schema_prints_json(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], document: str
) -> None:
    assert run(monkeypatch, "schema", document) == 0
    printed = orjson.loads(capfdbinary.readouterr().out)
    assert ("asyncapi" in printed) == (document == "asyncapi")
