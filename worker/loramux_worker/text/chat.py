"""Chat templates: a conversation to the text that the model was trained to continue."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loramux_schemas import ErrorCode
from loramux_schemas.errors import printable
from loramux_worker.errors import RequestFailed
from loramux_worker.text.time_limit import OutOfTime, time_limit

_MAX_REASON_CHARS = 256


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja template as Hugging Face tokenizers have it, rendered in their sandbox; `text` None: there is none.

    `special_tokens` are the variables that it may use beside the messages, such as `bos_token`. `owner` ("model",
    "adapter") is for people, `seconds` of processor time bound one rendering: a template is a program, and one that
    came with an adapter was written by somebody whom the operator need not know. Safe to use from several threads.
    """

    text: str | None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    owner: str = "model"
    seconds: float = math.inf

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation up to where the model speaks.

        Raises `RequestFailed` (invalid_request) if there is no template, or if it refuses the messages, as many
        refuse roles that do not alternate, is broken or takes too long.
        """
        if not self.text:
            raise RequestFailed(
                ErrorCode.INVALID_REQUEST, f"messages: the {self.owner} has no chat template; send a prompt instead"
            )
        from transformers.utils.chat_template_utils import render_jinja_template  # takes seconds, torch comes with it

        try:
            with time_limit(self.seconds):
                (rendered,), _ = render_jinja_template(
                    conversations=[[dict(message) for message in messages]],
                    chat_template=self.text,
                    add_generation_prompt=True,
                    **self.special_tokens,
                )
        except OutOfTime:
            raise self._refusal(f"takes more than {self.seconds:g} s for them") from None
        except Exception as error:  # a template is a program: it can fail in any way
            reason = printable(str(error) or type(error).__name__, limit=_MAX_REASON_CHARS)
            raise self._refusal(f"refuses them: {reason}") from None
        return str(rendered)

    def _refusal(self, what: str) -> RequestFailed:
        return RequestFailed(ErrorCode.INVALID_REQUEST, f"messages: the {self.owner}'s chat template {what}")
