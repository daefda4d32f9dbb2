"""Text from token ids as they come."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from loramux_worker.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_CHARACTER_TOKENS = 4  # a character has at most four bytes, a token at least one

_utf8 = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """The text of one answer, piece by piece; a piece never ends inside a character.

    All pieces together are what the tokenizer decodes the answer's tokens to behind the prompt: the leading space
    that SentencePiece drops at the start of a text stays. Bytes that are not UTF-8 become U+FFFD as soon as that is
    sure, an unfinished character only in `finish`. A token costs at most two decodes of a few tokens, however long
    the answer is.

    Tokens that stand for bytes go through an incremental UTF-8 decoder. A token of text may look different at the
    start of a text and after another token, so it is decoded behind the token before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._bytes = _utf8("replace")
        self._previous = next((i for i in reversed(prompt_token_ids) if self._counts(i)), None)
        self._pending: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; returns the text they complete, often empty."""
        pieces: list[str] = []
        for token_id in token_ids:
            if not self._counts(token_id):
                continue
            content = self._tokenizer.token_bytes(token_id)
            if content is None:
                pieces.append(self._finish_bytes())
                pieces.append(self._push_text(token_id))
            else:
                pieces.append(self._finish_text())
                pieces.append(self._push_bytes(token_id, content))
        return "".join(pieces)

    def finish(self) -> str:
        """The answer is complete; returns what was held back: U+FFFD for a character that never ended."""
        return self._finish_text() + self._finish_bytes()

    def _counts(self, token_id: int) -> bool:
        """Whether the token is part of the text: known, not empty, and not a special one that is skipped."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return False
        return bool(self._tokenizer.token(token_id))

    def _push_bytes(self, token_id: int, content: bytes) -> str:
        if self._previous is None and len(content) == 1 and content.isascii():
            # At the start of a text the decoder may drop a space, even one that is spelt as a byte.
            content = self._decode([token_id]).encode()
        self._previous = token_id
        return self._bytes.decode(content)

    def _finish_bytes(self) -> str:
        text = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        return text

    def _push_text(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._pending_text()
        # Some decoder that we do not know may hide bytes in its tokens: wait for the rest of the character.
        if text.endswith(_REPLACEMENT) and len(self._pending) < _MAX_CHARACTER_TOKENS:
            return ""
        self._previous = token_id
        self._pending.clear()
        return text

    def _finish_text(self) -> str:
        if not self._pending:
            return ""
        text = self._pending_text()
        self._previous = self._pending[-1]
        self._pending.clear()
        return text

    def _pending_text(self) -> str:
        if self._previous is None:
            return self._decode(self._pending)
        before = self._decode([self._previous])
        text = self._decode([self._previous, *self._pending])
        return text.removeprefix(before) if text.startswith(before) else self._decode(self._pending)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)
