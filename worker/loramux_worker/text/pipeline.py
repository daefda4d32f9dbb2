"""Text to token ids and back, through the `tokenizers` library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from loramux_worker.text.token_bytes import token_bytes_of


class Pipeline:
    """The backend of a fast Hugging Face tokenizer. Every method may be called from several threads at once.

    Text goes straight to the `tokenizers` library, since the Python layer above it changes settings of the shared
    tokenizer while it encodes, and cleans up spaces while it decodes, which cannot be done piece by piece.
    """

    def __init__(self, backend: Any) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self._bytes_of = token_bytes_of(self.decoder)
        self.token = lru_cache(maxsize=None)(self._token)
        self.token_bytes = lru_cache(maxsize=None)(self._token_bytes)
        self.token_text = lru_cache(maxsize=None)(self._token_text)

    @property
    def decoder(self) -> dict[str, Any] | None:
        """How tokens become text: the part of `tokenizer.json` under that name."""
        decoder = self._backend.decoder
        if decoder is None:
            return None
        parsed: dict[str, Any] = json.loads(decoder.__getstate__())
        return parsed

    def definition(self) -> str:
        """All of it, as `tokenizer.json` holds it."""
        definition: str = self._backend.to_str()
        return definition

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the definition: the same digest, the same pipeline."""
        return hashlib.sha256(self.definition().encode()).hexdigest()

    def vocabulary(self) -> dict[str, int]:
        """Every token, added ones too, and its id."""
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return vocabulary

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        # The batch call is the one that computes no offsets: a quarter of the time. Both release the GIL.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of all tokens at once; ids outside the vocabulary are passed over."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves this token out."""
        return token_id in self._special

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
