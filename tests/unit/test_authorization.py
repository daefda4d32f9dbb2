"""Which tenant may use which adapters, and what becomes of a file that changes."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from loramux_schemas import AdapterName, ErrorCode
from loramux_worker import authorization as module
from loramux_worker.authorization import Authorization
from loramux_worker.errors import ConfigurationError, RequestFailed

FILE = """
default = ["base", "shared/*"]
[tenants]
acme = ["acme/*", "one/exactly"]
"umbrella corp" = ["*-v[12]"]
nothing = []
"""


def of(tmp_path: Path, text: str = FILE, header: str = "tenant") -> Authorization:
    """The authorization of a file with this text."""
    path = tmp_path / "tenants.toml"
    path.write_text(text)
    return Authorization(path, header)


def allows(authorization: Authorization, tenant: bytes | None, adapter: str | None, header: str = "tenant") -> bool:
    """Whether a request with that header may use that adapter; a refusal is `forbidden` in one line."""
    headers: Any = [("other", b"acme"), *([] if tenant is None else [(header, tenant)])]
    refusal = None
    try:
        authorization.check(headers, None if adapter is None else AdapterName.parse(adapter))
    except RequestFailed as failed:
        refusal = failed
    if refusal is None:
        return True
    assert refusal.code is ErrorCode.FORBIDDEN
    assert not refusal.code.retryable
    assert refusal.message.isprintable()
    return False


@pytest.mark.parametrize(
    ("tenant", "adapter", "allowed"),
    [
        (b"acme", "acme/support", True),
        (b"acme", "acme/deep/er", True),
        (b"acme", "acme/support@sha256:" + "a" * 64, True),
        (b"acme", "acmes/support", False),
        (b"acme", "one/exactly", True),
        (b"acme", "one/exactly-not", False),
        (b"acme", "shared/x", True),
        (b"acme", None, True),
        (b"ACME", "acme/support", False),
        (b"umbrella corp", "any/thing-v2", True),
        (b"umbrella corp", "any/thing-v3", False),
        (b"nothing", "shared/x", True),
        (b"nothing", "acme/support", False),
        (b"unknown\nx", "acme/support", False),
        (b"unknown", "shared/x", True),
        (None, "shared/x", True),
        (None, None, True),
        (None, "acme/support", False),
        (b"", "acme/support", False),
        (b"\xff", "shared/x", False),
    ],
)
def test_who_may_use_what(tmp_path: Path, tenant: bytes | None, adapter: str | None, allowed: bool) -> None:
    assert allows(of(tmp_path), tenant, adapter) is allowed


def test_an_empty_file_allows_nothing_and_no_file_everything(tmp_path: Path) -> None:
    assert not allows(of(tmp_path, ""), b"acme", "acme/x")
    assert not allows(of(tmp_path, ""), None, None)
    assert not allows(of(tmp_path, 'default = ["*"]'), None, None)  # a pattern is not the base model
    assert allows(Authorization(None, "tenant"), None, "acme/x")
    assert allows(Authorization(None, "tenant"), None, None)


def test_the_header_has_a_name_of_its_own_and_one_value(tmp_path: Path) -> None:
    authorization = of(tmp_path, header="x-tenant")
    assert allows(authorization, b"acme", "acme/x", header="x-tenant")
    assert not allows(authorization, b"acme", "acme/x", header="tenant")
    twice = [("x-tenant", b"acme"), ("x-tenant", b"acme")]
    authorization.check(twice, AdapterName.parse("acme/x"))
    with pytest.raises(RequestFailed, match="more than one tenant"):
        authorization.check([*twice, ("x-tenant", b"evil")], AdapterName.parse("acme/x"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tenants = 3", "tenants: "),
        ('[tenants]\nacme = "acme/*"', "tenants.acme: must be an array"),
        ('[tenants]\nacme = ["a", ""]', "tenants.acme.1: must not be empty"),
        ("[tenants]\nacme = [1]", "tenants.acme.0: must be a string"),
        ('[tenant]\nacme = ["a"]', "tenant: unknown field"),
        ("default = [", "Invalid value"),
        ("default = " + "[" * 10_000, "nested too deeply"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_not_in_order_ends_the_start(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "tenants.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError) as wrong:
        Authorization(path, "tenant")
    line = str(wrong.value)
    assert line.startswith(f"--authorization-file {path}: ")
    assert said in line
    assert line.isprintable()


async def test_changes_are_followed_and_broken_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    path = tmp_path / "tenants.toml"
    authorization = of(tmp_path)
    following = asyncio.create_task(authorization.follow())
    with capture_logs() as events:

        async def said(*expected: str) -> None:
            limit = time.monotonic() + 10
            while [event["event"] for event in events] != list(expected):
                assert time.monotonic() < limit, events
                await asyncio.sleep(0.005)

        path.write_text('[tenants]\nacme = ["new/*"]')
        await said("authorization_changed")
        assert allows(authorization, b"acme", "new/x")
        assert not allows(authorization, b"acme", "acme/x")

        path.write_text("[tenants]\nacme = 7")
        await said("authorization_changed", "authorization_kept")
        assert events[-1]["log_level"] == "error"
        assert "tenants.acme" in events[-1]["reason"]
        assert allows(authorization, b"acme", "new/x")
        path.unlink()
        await said("authorization_changed", "authorization_kept", "authorization_kept")
        assert allows(authorization, b"acme", "new/x")

        # as Kubernetes changes a ConfigMap: the path is a link, which is replaced
        (tmp_path / "second.toml").write_text('[tenants]\nacme = ["second/*"]')
        (tmp_path / "link").symlink_to("second.toml")
        os.replace(tmp_path / "link", path)
        await said("authorization_changed", "authorization_kept", "authorization_kept", "authorization_changed")
        assert allows(authorization, b"acme", "second/x")
    following.cancel()
    await asyncio.wait([following])


async def test_a_file_that_is_being_written_is_not_read_halfway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.3)
    authorization = of(tmp_path)
    following = asyncio.create_task(authorization.follow())
    with (tmp_path / "tenants.toml").open("w") as file:
        for i in range(100):  # a prefix of it that ends with a line is a file in order, and lacks the last tenant
            file.write("[tenants]\n" if i == 0 else f'tenant-{i} = ["a"]\n')
            file.flush()
            await asyncio.sleep(0.01)
            assert allows(authorization, b"acme", "acme/x")
        file.write('acme = ["acme/*"]\nlast = ["a"]\n')
    limit = time.monotonic() + 10
    while not allows(authorization, b"last", "a"):
        assert allows(authorization, b"acme", "acme/x")
        assert time.monotonic() < limit
        await asyncio.sleep(0.005)
    following.cancel()
    await asyncio.wait([following])
