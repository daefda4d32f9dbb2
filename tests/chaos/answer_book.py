"""A tiny model with many adapters, and what each of them answers to each prompt, said by Hugging Face PEFT."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from tiny_models import VOCAB_SIZE, save_adapter, save_tokenizer

EOS = 257
MAX_NEW_TOKENS = 32
PROMPTS = 8
# The worker computes in other shapes than PEFT: where two tokens are nearer than this, the last bit would decide.
CLEAR_MARGIN = 1e-3

Pair = tuple[str, str | None]  # prompt, adapter


@dataclass(frozen=True)
class AnswerBook:
    """The model, its adapters' folder, and the greedy tokens of every (prompt, adapter) whose answer is beyond doubt.

    An answer ends with the end-of-sequence token or after MAX_NEW_TOKENS tokens; what is asked for less of is a prefix.
    """

    model: Path
    adapters: Path
    answers: dict[Pair, tuple[int, ...]]

    @property
    def adapter_ids(self) -> list[str]:
        """The adapters that there are questions for."""
        return sorted({adapter_id for _, adapter_id in self.answers if adapter_id is not None})

    def right(self, prompt: str, adapter_id: str | None, max_new_tokens: int) -> tuple[int, ...]:
        """The tokens of the right answer."""
        return self.answers[prompt, adapter_id][:max_new_tokens]

    def who_says(self, prompt: str, tokens: tuple[int, ...], max_new_tokens: int) -> list[str | None]:
        """Every adapter (None: the base model) that would have answered so."""
        return [
            who
            for (asked, who), answer in self.answers.items()
            if asked == prompt and answer[:max_new_tokens] == tokens
        ]


def write_book(folder: Path, num_adapters: int) -> AnswerBook:
    """Make model and adapters, always the same ones, and have PEFT answer every prompt with each."""
    torch.set_num_threads(1)  # threads that wait for one another at every tiny op
    torch.manual_seed(0)
    model = folder / "model"
    base = _save_model(model)
    adapters = folder / "adapters"
    ids = _save_adapters(model, adapters, num_adapters)
    prompts = _prompts()
    encoded = Tokenizer.from_file(str(model / "tokenizer.json")).encode_batch(prompts)
    prompt_ids = torch.tensor([e.ids for e in encoded])
    answers: dict[Pair, tuple[int, ...]] = {}
    for adapter_id, tuned in _each(base, adapters, ids):
        for prompt, answer in zip(prompts, _greedy(tuned, prompt_ids), strict=True):
            if answer is not None:
                answers[prompt, adapter_id] = answer
    return AnswerBook(model, adapters, answers)


def _save_model(path: Path) -> Any:
    """As small as a Llama can be: what is tested is not the arithmetic."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        bos_token_id=256,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    save_tokenizer(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def _save_adapters(model: Path, adapters: Path, count: int) -> list[str]:
    """One that PEFT has saved, and the others of its shape with other weights."""
    ids = [f"tenant-{i % 7}/tune-{i}" for i in range(count)]
    first = adapters / ids[0]
    save_adapter(model, first, ["q_proj", "v_proj", "down_proj", "lm_head"], rank=4)
    shapes = {name: weights.shape for name, weights in load_file(first / "adapter_model.safetensors").items()}
    config = json.loads((first / "adapter_config.json").read_text())
    for i, adapter_id in enumerate(ids):
        generator = torch.Generator().manual_seed(i)
        folder = adapters / adapter_id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        weights = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
        save_file(weights, folder / "adapter_model.safetensors")
    return ids


def _prompts() -> list[str]:
    """All of one length, so that PEFT can take them as one batch."""
    generator = random.Random(0)
    return [f"q{i}: {''.join(generator.choices('abcdefghij ', k=20))}" for i in range(PROMPTS)]


def _each(base: Any, adapters: Path, ids: list[str]) -> Iterator[tuple[str | None, Any]]:
    yield None, base
    tuned: Any = None
    for number, adapter_id in enumerate(ids):
        name = str(number)
        if tuned is None:
            tuned = peft.PeftModel.from_pretrained(base, adapters / adapter_id, adapter_name=name)
        else:
            tuned.load_adapter(adapters / adapter_id, adapter_name=name)
        tuned.set_adapter(name)
        yield adapter_id, tuned
        if number > 0:
            tuned.set_adapter("0")
            tuned.delete_adapter(name)  # many at once make every forward pass slower


@torch.inference_mode()
def _greedy(model: Any, ids: torch.Tensor) -> list[tuple[int, ...] | None]:
    """The answer of each row of `ids` [P, T]; None where it hangs by a hair."""
    num_prompt_tokens = ids.shape[1]
    ended = torch.zeros(len(ids), dtype=torch.bool)
    clear = torch.ones(len(ids), dtype=torch.bool)
    for _ in range(MAX_NEW_TOKENS):
        (best, second), (token, _) = (each.unbind(1) for each in model.eval()(ids).logits[:, -1].topk(2))
        clear &= ended | (best - second > CLEAR_MARGIN)
        ended |= token == EOS
        ids = torch.cat([ids, token[:, None]], dim=1)
    answers: list[tuple[int, ...] | None] = []
    for row, is_clear in zip(ids[:, num_prompt_tokens:].tolist(), clear.tolist(), strict=True):
        end = row.index(EOS) + 1 if EOS in row else len(row)
        answers.append(tuple(row[:end]) if is_clear else None)
    return answers
