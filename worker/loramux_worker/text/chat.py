"""Chat templates: a conversation to the text that the model was trained to continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loramux_schemas import ErrorCode
from loramux_schemas.errors import printable
from loramux_worker.errors import RequestFailed

_MAX_REASON_CHARS = 256


class ChatTemplate:
    """The template of a Hugging Face tokenizer, in its Jinja sandbox. Safe to use from several threads."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation up to where the model speaks.

        Raises `RequestFailed` (invalid_request) if the model has no template or the template refuses the messages,
        as many refuse roles that do not alternate.
        """
        if not self._tokenizer.chat_template:
            raise RequestFailed(
                ErrorCode.INVALID_REQUEST, "messages: the model has no chat template; send a prompt instead"
            )
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program: it can fail in any way
            reason = printable(str(error) or type(error).__name__, limit=_MAX_REASON_CHARS)
            message = f"messages: the model's chat template refuses them: {reason}"
            raise RequestFailed(ErrorCode.INVALID_REQUEST, message) from None
        return str(rendered)
