"""Loading the fast tokenizer of a folder with Hugging Face's own code, whoever wrote the folder's files."""

from __future__ import annotations

from typing import Any

from loramux_schemas.errors import printable

_MAX_REASON_CHARS = 300


class UnusableTokenizer(ValueError):
    """There is no fast tokenizer in a folder; one line says why."""


def load_fast_tokenizer(folder: str, **options: Any) -> Any:
    """The tokenizer that `AutoTokenizer` makes of a folder or hub id, which runs no code from there.

    Raises `UnusableTokenizer`, whatever is wrong with the files.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # takes seconds, torch comes with it

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False, **options)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the Rust of `tokenizers` is no Exception
        reason = printable(str(error).partition("\n")[0].strip(" .:"), limit=_MAX_REASON_CHARS) or type(error).__name__
        raise UnusableTokenizer(f"no usable tokenizer (a tokenizer.json is needed): {reason}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnusableTokenizer(f"a slow tokenizer only ({type(tokenizer).__name__}): add its tokenizer.json")
    if tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False) == 0:
        raise UnusableTokenizer("no tokenizer: add its tokenizer.json")
    return tokenizer


def chat_template_text(tokenizer: Any) -> str | None:
    """The template that a fast tokenizer uses where none is named; None if it has none."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        return None
    return template if isinstance(template, str) else None
