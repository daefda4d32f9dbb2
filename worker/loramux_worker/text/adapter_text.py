"""What an adapter brings of text, put over the model's: tokenizer, chat template, end of sequence.

- With `tokenizer.json` the tokenizer is what its own files say. Without one it is the model's, to which
  `tokenizer_config.json` and its like may give other special tokens.
- The chat template is its own (`chat_template.jinja`, or in `tokenizer_config.json`), else the model's.
- A sequence ends with the tokens of its `generation_config.json`, else with the model's; and with the end of
  sequence of its tokenizer where that is another than the model's tokenizer has.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from loramux_worker.adapters.invalid import AdapterInvalid, parse_object
from loramux_worker.adapters.regular_file import open_regular, read_up_to, unreadable
from loramux_worker.adapters.text_files import (
    GENERATION_FILE,
    MAX_TEXT_BYTES,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
)
from loramux_worker.text.chat import ChatTemplate
from loramux_worker.text.eos import named_eos_token_ids
from loramux_worker.text.fast_tokenizer import UnusableTokenizer, chat_template_text, load_fast_tokenizer
from loramux_worker.text.pipeline import Pipeline
from loramux_worker.text.tokenizer import Tokenizer
from loramux_worker.text.vocabulary import check_vocabulary

TEMPLATE_SECONDS = 1.0  # of processor time; a conversation of twenty messages takes a thousandth of it


class AdapterText:
    """The text files of an adapter folder, read. Raises AdapterInvalid, and RequestFailed when the disk fails."""

    def __init__(self, folder: Path) -> None:
        try:
            names = set(os.listdir(folder))
        except OSError as error:
            raise unreadable("its folder", error) from None
        self.files: Mapping[str, bytes] = {
            name: _read(folder, name, most) for name, most in MAX_TEXT_BYTES.items() if name in names
        }

    @property
    def digest(self) -> str:
        """SHA-256 of what is in them: the same digest, the same text."""
        parts = (f"{name}\0{hashlib.sha256(content).hexdigest()}\n" for name, content in sorted(self.files.items()))
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def tokenizer(self, base: Tokenizer, model: str, threads: Executor | None = None) -> Tokenizer:
        """The adapter's tokenizer over that of the model (a folder or hub id), `base` itself without any files.

        It does its slow work in `threads`. It takes seconds and much of the processor: not for the event loop.

        Raises:
            AdapterInvalid: a file cannot be used, or the tokenizer's vocabulary is not the model's.
            OSError: there is no room for temporary files.
        """
        if not self.files:
            return base
        pipeline, template, end = base.pipeline, base.chat_template, base.end_token_id
        if any(name in self.files for name in TOKENIZER_FILES):
            loaded = self._load(base, model)
            pipeline = _checked(base.pipeline, Pipeline(loaded.backend_tokenizer))
            template = self._template(chat_template_text(loaded), loaded.special_tokens_map, base)
            end = loaded.eos_token_id
        elif TEMPLATE_FILE in self.files:
            template = self._template(self._decode(TEMPLATE_FILE), base.chat_template.special_tokens, base)
        return Tokenizer(pipeline, template, self._eos_token_ids(base, end), end, threads)

    def _load(self, base: Tokenizer, model: str) -> Any:
        """What Hugging Face makes of these files alone, as the kind of tokenizer that the model has."""
        with tempfile.TemporaryDirectory(prefix="loramux-text-") as folder:
            for name in (*TOKENIZER_FILES, TEMPLATE_FILE):
                if name in self.files:
                    Path(folder, name).write_bytes(self.files[name])
            if TOKENIZER_FILE not in self.files:
                Path(folder, TOKENIZER_FILE).write_text(base.pipeline.definition())
            try:
                return load_fast_tokenizer(folder, config=_config(model), local_files_only=True)
            except UnusableTokenizer as error:
                raise AdapterInvalid(f"its tokenizer files hold {str(error).replace(folder, '…')}") from None

    def _template(self, own: str | None, special_tokens: Mapping[str, str], base: Tokenizer) -> ChatTemplate:
        if own is None:
            return ChatTemplate(base.chat_template.text, special_tokens)
        return ChatTemplate(own, special_tokens, "adapter", TEMPLATE_SECONDS)

    def _eos_token_ids(self, base: Tokenizer, end: int | None) -> tuple[int, ...]:
        ids = None
        if GENERATION_FILE in self.files:
            try:
                ids = named_eos_token_ids(parse_object(self.files[GENERATION_FILE], GENERATION_FILE))
            except ValueError as error:
                raise AdapterInvalid(f"{GENERATION_FILE}: {error}") from None
        chosen = () if end is None or end == base.end_token_id else (end,)
        return tuple(dict.fromkeys((base.eos_token_ids if ids is None else ids) + chosen))

    def _decode(self, name: str) -> str:
        try:
            return self.files[name].decode()
        except UnicodeDecodeError:
            raise AdapterInvalid(f"{name} is not UTF-8") from None


def _read(folder: Path, name: str, most: int) -> bytes:
    with open_regular(folder, name) as file:
        content = read_up_to(file, most + 1, name)
    if len(content) > most:
        raise AdapterInvalid(f"{name} has more than {most} bytes")
    return content


def _checked(model: Pipeline, own: Pipeline) -> Pipeline:
    """The adapter's pipeline, or the model's if they are the same: thousands of adapters share one then."""
    if own.digest == model.digest:
        return model
    check_vocabulary(model, own)
    return own


def _config(model: str) -> Any:
    """The model's config, which has a say in what kind of tokenizer is made; None if it has none that is known."""
    from transformers import AutoConfig  # takes seconds, torch comes with it

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError):
        return None
