"""Bytes of a model, of its KV cache and of adapters, by its config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux_worker.errors import ConfigurationError

ELEMENT_BYTES = 2  # bfloat16


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder of the Llama shape: gated MLP, grouped queries."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False

    @classmethod
    def find(cls, text: str) -> ModelShape:
        """One of `KNOWN`, or of the config.json of a folder. Raises ConfigurationError for anything else."""
        if text in KNOWN:
            return KNOWN[text]
        path = Path(text) / "config.json" if Path(text).is_dir() else Path(text)
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            known = ", ".join(KNOWN)
            raise ConfigurationError(f"--model {text}: say a model folder, its config.json, or {known}") from error
        if not isinstance(config, dict):
            raise ConfigurationError(f"--model {path}: it holds no object")
        return cls._read(path, config.get("text_config", config))

    @classmethod
    def _read(cls, path: Path, config: dict[str, Any]) -> ModelShape:
        def number(name: str, default: int | None = None) -> int:
            value = config.get(name) or default
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"--model {path}: {name} is {value}, not a positive number")
            return value

        heads, hidden = number("num_attention_heads"), number("hidden_size")
        return cls(
            name=path.parent.name or str(path),
            layers=number("num_hidden_layers"),
            hidden=hidden,
            intermediate=number("intermediate_size"),
            heads=heads,
            kv_heads=number("num_key_value_heads", heads),
            head_dim=number("head_dim", hidden // heads),
            vocabulary=number("vocab_size"),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of a layer's seven linear modules: q, k, v, o, gate, up, down."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        hidden, wide = self.hidden, self.intermediate
        attention = ((hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden))
        return (*attention, (hidden, wide), (hidden, wide), (wide, hidden))

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that every step reads: all but the token embedding."""
        head = self.hidden * self.vocabulary
        return ELEMENT_BYTES * (self.layers * sum(i * o for i, o in self.linears) + head)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights on the device."""
        return self.step_bytes + (0 if self.tied else ELEMENT_BYTES * self.hidden * self.vocabulary)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token."""
        return ELEMENT_BYTES * 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def adapter_bytes_per_rank(self) -> int:
        """Bytes of one rank of an adapter on all seven linears."""
        return ELEMENT_BYTES * self.layers * sum(i + o for i, o in self.linears)


_LLAMA_8B = ModelShape(
    name="8b", layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocabulary=128256
)
_TINYLLAMA = ModelShape(
    name="1b", layers=22, hidden=2048, intermediate=5632, heads=32, kv_heads=4, head_dim=64, vocabulary=32000
)

KNOWN = {shape.name: shape for shape in (_LLAMA_8B, _TINYLLAMA)}
"""Shapes that were measured: Llama 3.1 8B, TinyLlama 1.1B."""
