from __future__ import annotations

import re
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_schemas import AdapterName


@pytest.mark.parametrize("text", ["a", "acme/support", "A-1_b.c/d/e", "...", ".hidden/x", "-", "a" * 256])
def test_good_names(text: str) -> None:
    assert AdapterName.parse(text) == AdapterName(text, None)
    assert str(AdapterName.parse(text)) == text


def test_a_pin() -> None:
    name = AdapterName.parse("acme/support@sha256:0af1")
    assert name == AdapterName("acme/support", "sha256:0af1")
    assert str(name) == "acme/support@sha256:0af1"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "a/",
        "/a",
        "a//b",
        ".",
        "..",
        "a/..",
        "../a",
        "a/./b",
        "a b",
        "a\n",
        "a\\b",
        "a:b",
        "a%2e",
        "é",
        "\ud800",
        "a\x00",
        "@",
        "@r",
        "a@",
        "a@..",
        "a@b/c",
        "a@b@c",
        "a@r\n",
        "a" * 257,
        "a@" + "b" * 255,
        "x" * 10_000_000,
    ],
)
def test_bad_names(text: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        AdapterName.parse(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_no_instance_is_invalid() -> None:
    with pytest.raises(ValueError, match="adapter id"):
        AdapterName("../x")
    with pytest.raises(ValueError, match="revision"):
        AdapterName("x", "")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab./@:-_ é\\", max_size=12))
def test_a_name_never_leaves_its_folder(text: str) -> None:
    try:
        name = AdapterName.parse(text)
    except ValueError:
        return
    path = PurePosixPath("root") / name.adapter_id
    assert ".." not in path.parts
    assert path.parts[0] == "root"
    assert str(path) == f"root/{name.adapter_id}"
    assert re.fullmatch(r"[A-Za-z0-9._/-]+", name.adapter_id)
    assert str(name) == text
