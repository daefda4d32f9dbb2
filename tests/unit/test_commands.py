"""What `send` and `batch` say when the caller must change something: one line and exit code 2, and nothing is sent."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from loramux_producer.batch import BatchInput
from loramux_producer.commands import batch, send
from loramux_producer.journal import Journal
from loramux_producer.options import chat_messages, other_fields
from loramux_schemas import Reply

NOBODY = "127.0.0.1:9"

app = typer.Typer()
app.command()(send)
app.command()(batch)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAMUX_BOOTSTRAP_SERVERS", NOBODY)
    (tmp_path / "bad.jsonl").write_text('{"prompt":"x"}\nnonsense\n')
    (tmp_path / "good.jsonl").write_text('{"prompt":"x"}\n')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["send", "x", "-P", "top_q=1"], "parameters.top_q: unknown field"),
        (["send", "x", "-P", "oops"], "--parameter oops: expected key=value"),
        (["send", "x", "-P", "prompt=y"], "--parameter prompt: give it as an argument"),
        (["send", "x", "-p", "y"], "prompt: given as an argument and with --prompt"),
        (["send", "x", "-m", "y"], "messages: given together with prompt"),
        (["send", "x", "-a", "../up"], "adapter_id: "),
        (["send", "x", "-n", "0"], "parameters.max_new_tokens: "),
        (["send"], "no prompt: stdin is empty"),
        (["send", "x", "--security-protocol", "TLS"], "security_protocol: "),
        (
            ["send", "x", "--security-protocol", "SASL_SSL"],
            "security_protocol SASL_SSL with sasl_mechanism PLAIN needs sasl_username",
        ),
        (
            ["send", "x", "--security-protocol", "SSL", "--ssl-cafile", "absent.pem"],
            "ssl_cafile: cannot read absent.pem",
        ),
        (["send", "x", "-H", "tenant"], "--header tenant: expected key=value"),
        (["send", "x", "--bootstrap-servers", "nowhere"], "bootstrap_servers: 'nowhere' is not host:port"),
        (["send", "x"], f"no Kafka broker answers at {NOBODY} ({NOBODY}: "),
        (["batch", "absent.jsonl", "out.jsonl"], "absent.jsonl: No such file"),
        (["batch", "bad.jsonl", "out.jsonl"], "bad.jsonl, line 2: not JSON"),
        (["batch", "good.jsonl", "bad.jsonl"], "bad.jsonl exists: remove it, or give --overwrite"),
        (["batch", "good.jsonl", "absent/out.jsonl"], "absent/out.jsonl.partial: No such file"),
        (["batch", "good.jsonl", "out.jsonl", "--timeout", "nan"], "timeout: nan is not a positive number"),
        (["batch", "good.jsonl", "out.jsonl"], f"no Kafka broker answers at {NOBODY} ({NOBODY}: "),
    ],
)
def test_one_line_and_exit_code_2(tmp_path: Path, arguments: Sequence[str], message: str) -> None:
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert outcome.stderr.startswith(f"loramux: {message}")
    assert outcome.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"bad.jsonl", "good.jsonl"}


def test_a_prompt_that_is_not_text_is_refused() -> None:
    outcome = CliRunner().invoke(app, ["send"], input=b"\xff\xfe")
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert outcome.stderr == "loramux: the prompt on stdin is not UTF-8: invalid start byte at byte 0\n"


def test_a_complete_journal_becomes_the_output_without_kafka(tmp_path: Path) -> None:
    source = BatchInput.check(tmp_path / "good.jsonl")
    with Journal(tmp_path / "out.jsonl.partial", source.digest) as journal:
        journal.append(1, Reply(request_id="r1", generated_text="from before the kill"))
    outcome = CliRunner().invoke(app, ["batch", "good.jsonl", "out.jsonl"])
    assert (outcome.exit_code, outcome.output) == (0, "")
    assert Reply.from_json((tmp_path / "out.jsonl").read_bytes()).generated_text == "from before the kill"
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_an_empty_batch_needs_no_kafka(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    outcome = CliRunner().invoke(app, ["batch", "empty.jsonl", "out.jsonl"])
    assert (outcome.exit_code, outcome.output) == (0, "")
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_help_names_the_environment() -> None:
    outcome = CliRunner().invoke(app, ["send", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert outcome.exit_code == 0
    shown = re.sub(r"\x1b\[[0-9;]*m", "", outcome.stdout)
    assert "LORAMUX_BOOTSTRAP_SERVERS" in shown
    assert "--max-new-tokens" in shown


def test_messages_and_fields() -> None:
    assert chat_messages([]) is None
    assert chat_messages(["system: be brief", "user:hi", "what: ever", "tool: 1: 2"]) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "user", "content": "what: ever"},
        {"role": "tool", "content": "1: 2"},
    ]
    assert other_fields(["seed=7", 'stop=["a=b"]', "request_id=r1", "do_sample=true", "x="]) == {
        "seed": 7,
        "stop": ["a=b"],
        "request_id": "r1",
        "do_sample": True,
        "x": "",
    }
