"""The tokenizer of the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from loramux_schemas.errors import printable
from loramux_worker.errors import ConfigurationError
from loramux_worker.text.chat import ChatTemplate
from loramux_worker.text.eos import eos_token_ids
from loramux_worker.text.token_bytes import token_bytes_of


class Tokenizer:
    """A fast Hugging Face tokenizer. Every method may be called from several threads at once.

    Text goes straight to the `tokenizers` library, since the Python layer above it changes settings of the shared
    tokenizer while it encodes, and cleans up spaces while it decodes, which cannot be done piece by piece.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: tuple[int, ...]) -> None:
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = ChatTemplate(tokenizer)
        self._special = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        decoder = backend.decoder
        self._bytes_of = token_bytes_of(None if decoder is None else json.loads(decoder.__getstate__()))
        self.eos_token_ids = eos_token_ids
        self.token = lru_cache(maxsize=None)(self._token)
        self.token_bytes = lru_cache(maxsize=None)(self._token_bytes)
        self.token_text = lru_cache(maxsize=None)(self._token_text)

    @classmethod
    def load(cls, folder: str) -> Tokenizer:
        """Load the tokenizer of a model folder (or hub id). Raises `ConfigurationError` if it has no fast one."""
        if folder.startswith(("/", ".", "~")) and not Path(folder).is_dir():  # no hub id looks like this
            raise ConfigurationError(f"--model: no such folder: {folder}")
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # takes seconds, torch comes with it

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
        except Exception as error:  # whatever is wrong with the files, it is for a person to mend
            reason = printable(str(error).partition("\n")[0].strip(" .:"), limit=300) or type(error).__name__
            raise ConfigurationError(
                f"--model: no usable tokenizer in {folder} (a tokenizer.json is needed): {reason}"
            ) from None
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ConfigurationError(
                f"--model: {folder} has a slow tokenizer only ({type(tokenizer).__name__}): add its tokenizer.json"
            )
        if tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False) == 0:
            raise ConfigurationError(f"--model: no tokenizer in {folder}: add its tokenizer.json")
        return cls(tokenizer, eos_token_ids(folder, tokenizer.eos_token_id))

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds by default."""
        return self._encode(text, add_special_tokens=True)

    def encode_messages(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation (`role`, `content`) up to where the model speaks.

        The template writes the special tokens, so none are added. Raises `RequestFailed` (invalid_request) if there
        is no template or it refuses the messages.
        """
        return self._encode(self._chat_template.render(messages), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of all tokens at once; ids outside the vocabulary are passed over."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves this token out."""
        return token_id in self._special

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # The batch call is the one that computes no offsets: a quarter of the time. Both release the GIL.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def _token(self, token_id: int) -> str:
        """The vocabulary's entry, which is not yet text; empty for an id outside the vocabulary."""
        return self._backend.id_to_token(token_id) or ""

    def _token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that the token stands for; None if it stands for text."""
        return self._bytes_of(self.token(token_id))

    def _token_text(self, token_id: int) -> str:
        """The token as it looks inside a text, with its leading space; U+FFFD for a part of a character."""
        content = self.token_bytes(token_id)
        if content is not None:
            return content.decode(errors="replace")
        if not self.token(token_id):
            return ""
        before = self.decode([token_id], skip_special_tokens=False)
        twice = self.decode([token_id, token_id], skip_special_tokens=False)
        return twice.removeprefix(before)
