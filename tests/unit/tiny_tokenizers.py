"""Small tokenizers of every kind, built on the spot."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 20,
    "日本語のテキストと漢字。" * 20,
    "emoji: 😀 👩‍👩‍👧 🇩🇪 ñandú Ünïcödé " * 20,
    "  indented\n\ttabs   and   runs of spaces\n" * 20,
]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@cache
def byte_level() -> str:
    """BPE over GPT-2's byte alphabet, as Llama 3, Qwen and GPT-NeoX have it; JSON."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<s>", "</s>", "<pad>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    # Some tokens that end inside a character, as large vocabularies have them.
    backend.add_tokens([AddedToken("<tool call>", special=False), AddedToken("<é>", special=False)])
    return _with_bos(backend)


def sentencepiece(decoder: str = "llama") -> str:
    """A Unigram model with `▁` for spaces and byte fallback; decoders of Llama 2, Gemma and T5; JSON."""
    words = ["▁", "▁▁", "▁the", "▁fox", "▁é", "the", "fo", "x", "語", "日", "😀", ".", "\n", "▁▁▁▁", "s", "e"]
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    vocabulary += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocabulary += [(word, -float(rank + 1)) for rank, word in enumerate(words)]
    backend = Backend(models.Unigram(vocabulary, 0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    to_space = decoders.Replace("▁", " ")
    parts = {
        "llama": [to_space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)],
        "gemma": [to_space, decoders.ByteFallback(), decoders.Fuse()],
        "t5": [decoders.ByteFallback(), decoders.Metaspace()],
    }[decoder]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return _with_bos(backend)


def word_piece() -> str:
    """BERT's kind: `##` continues a word; JSON."""
    words = ["[UNK]", "<s>", "</s>", "the", "fox", "##es", "##s", ".", ",", "don", "'", "t", "n't", "é", "語"]
    backend = Backend(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=True)
    backend.add_special_tokens(["<s>", "</s>"])
    return _with_bos(backend)


def hidden_bytes() -> str:
    """Byte-level tokens inside a longer decoder, which we do not know by name; JSON."""
    return hidden_decoder(Backend.from_str(byte_level()))


def hidden_decoder(backend: Backend) -> str:
    """The same tokenizer with another decoder; JSON."""
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(Regex("zzz+"), "z")])
    return str(backend.to_str())


def _with_bos(backend: Backend) -> str:
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return str(backend.to_str())


def save(folder: Path, backend: str, *, chat_template: str | None = CHAT_TEMPLATE) -> str:
    """Write a model folder's text files; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer.json").write_text(backend)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(folder)
