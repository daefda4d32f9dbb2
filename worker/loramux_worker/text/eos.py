"""Which tokens end a text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loramux_worker.adapters.text_files import GENERATION_FILE
from loramux_worker.errors import ConfigurationError


def eos_token_ids(model: str, tokenizer_eos_token_id: int | None) -> tuple[int, ...]:
    """End-of-sequence tokens of a model: as `generate` takes them, from the first place that names any.

    `generation_config.json`, then `config.json`, then the tokenizer. Raises `ConfigurationError` for a file that
    cannot be read.
    """
    config = _read(model, "config.json")
    text_config = config.get("text_config")
    places = (
        (GENERATION_FILE, _read(model, GENERATION_FILE)),
        ("config.json", config),
        ("config.json", text_config if isinstance(text_config, dict) else {}),
    )
    for name, content in places:
        try:
            ids = named_eos_token_ids(content)
        except ValueError as error:
            raise ConfigurationError(f"--model: {name} of {model}: {error}") from None
        if ids is not None:
            return ids
    return () if tokenizer_eos_token_id is None else (tokenizer_eos_token_id,)


def named_eos_token_ids(content: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The end-of-sequence tokens that a config names, None if it names none. Raises `ValueError` if they are no ids."""
    value = content.get("eos_token_id")
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(f"eos_token_id is not a token id: {ascii(value)[:80]}")
    return tuple(dict.fromkeys(ids))


def _read(model: str, name: str) -> dict[str, Any]:
    from transformers.utils import cached_file  # takes seconds, torch comes with it

    path = cached_file(
        model,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--model: cannot read {name} of {model}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"--model: {name} of {model} is not a JSON object")
    return content
