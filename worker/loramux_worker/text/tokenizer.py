"""The tokenizer of the model, or of one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

from loramux_worker.errors import ConfigurationError
from loramux_worker.text.chat import ChatTemplate
from loramux_worker.text.eos import eos_token_ids
from loramux_worker.text.fast_tokenizer import UnusableTokenizer, chat_template_text, load_fast_tokenizer
from loramux_worker.text.pipeline import Pipeline


class Tokenizer:
    """Everything about the text of a request: its tokens, its chat template and where its answer ends.

    `eos_token_ids` end a sequence; `end_token_id` is the one that the tokenizer's own files call so. `threads` is
    where it does its slow work (None: where the event loop does). Every method may be called from several threads.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        chat_template: ChatTemplate,
        eos_token_ids: tuple[int, ...],
        end_token_id: int | None,
        threads: Executor | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.chat_template = chat_template
        self.eos_token_ids = eos_token_ids
        self.end_token_id = end_token_id
        self.threads = threads
        self.token = pipeline.token
        self.token_bytes = pipeline.token_bytes
        self.token_text = pipeline.token_text
        self.is_special = pipeline.is_special

    @classmethod
    def load(cls, folder: str) -> Tokenizer:
        """Load the tokenizer of a model folder (or hub id). Raises `ConfigurationError` if it has no fast one."""
        if folder.startswith(("/", ".", "~")) and not Path(folder).is_dir():  # no hub id looks like this
            raise ConfigurationError(f"--model: no such folder: {folder}")
        try:
            tokenizer = load_fast_tokenizer(folder)
        except UnusableTokenizer as error:
            raise ConfigurationError(f"--model: {folder} has {error}") from None
        template = ChatTemplate(chat_template_text(tokenizer), tokenizer.special_tokens_map)
        end = tokenizer.eos_token_id
        return cls(Pipeline(tokenizer.backend_tokenizer), template, eos_token_ids(folder, end), end)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds by default."""
        return self.pipeline.encode(text, add_special_tokens=True)

    def encode_messages(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation (`role`, `content`) up to where the model speaks.

        The template writes the special tokens, so none are added. Raises `RequestFailed` (invalid_request) if there
        is no template or it refuses the messages.
        """
        return self.pipeline.encode(self.chat_template.render(messages), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of all tokens at once; ids outside the vocabulary are passed over."""
        return self.pipeline.decode(token_ids, skip_special_tokens)
