"""The text files of a model into which an adapter was merged: it reads and writes as the adapter did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loramux_worker.adapters.text_files import GENERATION_FILE, TEMPLATE_FILE, TOKENIZER_FILE, TOKENIZER_FILES
from loramux_worker.text.adapter_text import AdapterText
from loramux_worker.text.tokenizer import Tokenizer


class MergedText:
    """An adapter's text over that of the model in a folder.

    Raises ConfigurationError when the model has no tokenizer, AdapterInvalid when the adapter's cannot be used.
    """

    def __init__(self, text: AdapterText, model: str) -> None:
        self._files = text.files
        self._base = Tokenizer.load(model)
        self._own = text.tokenizer(self._base, model)

    def write(self, folder: Path) -> None:
        """Put it over a copy of the model's files. Raises OSError."""
        own = [name for name in TOKENIZER_FILES if name in self._files]
        for name in TOKENIZER_FILES if own else ():
            if name != TOKENIZER_FILE:  # the model's other files speak of the model's special tokens
                (folder / name).unlink(missing_ok=True)
        for name in own:
            (folder / name).write_bytes(self._files[name])
        template = self._own.chat_template.text
        if template is not None and (own or TEMPLATE_FILE in self._files):
            (folder / TEMPLATE_FILE).write_text(template)  # goes before one in tokenizer_config.json
        if GENERATION_FILE in self._files or self._own.eos_token_ids != self._base.eos_token_ids:
            self._write_generation_config(folder / GENERATION_FILE)

    def _write_generation_config(self, path: Path) -> None:
        if GENERATION_FILE in self._files:
            content: dict[str, Any] = json.loads(self._files[GENERATION_FILE])
        else:
            content = json.loads(path.read_bytes()) if path.exists() else {}
        ids = list(self._own.eos_token_ids)
        content["eos_token_id"] = ids[0] if len(ids) == 1 else ids
        path.write_text(json.dumps(content, indent=2) + "\n")
