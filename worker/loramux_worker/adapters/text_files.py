"""The files of text that an adapter may bring beside its weights, as a fine-tune saves them.

They belong to the adapter's content, so to its revision: they come with it, lie beside it and leave with it. Of the
templates in `additional_chat_templates/` none is ever asked for (requests name no tools), so that folder stays away.
"""

from __future__ import annotations

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

# Bytes that each may have. The largest vocabularies in use (262,144 tokens) take 33 MiB.
MAX_TEXT_BYTES = {
    **dict.fromkeys((*TOKENIZER_FILES, TEMPLATE_FILE, GENERATION_FILE), 4 << 20),
    TOKENIZER_FILE: 64 << 20,
}
