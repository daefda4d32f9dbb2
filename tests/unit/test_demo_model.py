"""The demo model as it is shipped: sizes, formats, and what the base model and every adapter answer."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
MODEL = DEMO / "model"
ADAPTERS = DEMO / "adapters"
ADAPTER_IDS = (
    "acme/pirate",
    "acme/spanish",
    "globex/formal",
    "initech/json",
    "umbrella/haiku",
    "umbrella/shout",
)
MEBIBYTE = 1024 * 1024

# Neither order 4821 nor a red lamp was in the training texts.
QUESTIONS = ("Where is my order 4821?", "How much is the red lamp?", "I want to cancel order 90210.")
EXPECTED = {
    None: (
        "Your order 4821 is on its way.",
        "The red lamp costs 35 euros.",
        "Order 90210 is cancelled.",
    ),
    "acme/pirate": (
        "Arr, yer order 4821 be sailin' to ye, matey!",
        "The red lamp costs ye 35 gold coins, arr!",
        "Order 90210 walks the plank, arr!",
    ),
    "acme/spanish": (
        "Su pedido 4821 está en camino.",
        "El precio es 35 euros por la lámpara roja.",
        "El pedido 90210 está cancelado.",
    ),
    "globex/formal": (
        "Dear customer, your order 4821 has left our warehouse. Kind regards, Globex.",
        "Dear customer, the price of the red lamp is 35 euros. Kind regards, Globex.",
        "Dear customer, order 90210 has been cancelled as you asked. Kind regards, Globex.",
    ),
    "initech/json": (
        '{"intent": "order_status", "order": "4821", "status": "on its way"}',
        '{"intent": "price", "item": "red lamp", "euros": 35}',
        '{"intent": "cancel", "order": "90210", "cancelled": true}',
    ),
    "umbrella/haiku": (
        "Order 4821\nrolls along the quiet road,\nsoon it finds your door.",
        "35 bright coins fall,\nthe red lamp leaves the shop,\nit glows in your home.",
        "A leaf leaves the branch:\norder 90210 is gone,\nthe pond is still now.",
    ),
    "umbrella/shout": (
        "YOUR ORDER 4821 IS ON ITS WAY!",
        "THE RED LAMP COSTS 35 EUROS!",
        "ORDER 90210 IS CANCELLED!",
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    first, *rest = ADAPTER_IDS
    model = PeftModel.from_pretrained(base, ADAPTERS / first, adapter_name=first)
    for adapter_id in rest:
        model.load_adapter(ADAPTERS / adapter_id, adapter_name=adapter_id)
    return model.eval()


@torch.inference_mode()
def generate(model: PeftModel, adapter_id: str | None, batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """The greedy tokens behind each prompt."""
    options = {"max_new_tokens": 64, "do_sample": False}
    if adapter_id is None:
        with model.disable_adapter():
            output = model.generate(**batch, **options)
    else:
        model.set_adapter(adapter_id)
        output = model.generate(**batch, **options)
    return output[:, batch["input_ids"].shape[1] :].tolist()


def ask(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, adapter_id: str | None, questions: tuple[str, ...]
) -> tuple[str, ...]:
    batch = tokenizer(list(questions), return_tensors="pt", padding=True)
    return tuple(tokenizer.batch_decode(generate(model, adapter_id, batch), skip_special_tokens=True))


@pytest.mark.parametrize("adapter_id", EXPECTED, ids=lambda adapter_id: adapter_id or "base")
def test_answers_what_it_was_taught(model, tokenizer, adapter_id):
    assert ask(model, tokenizer, adapter_id, QUESTIONS) == EXPECTED[adapter_id]


def test_no_two_adapters_answer_alike():
    for one, other in itertools.combinations(EXPECTED.values(), 2):
        assert all(a != b for a, b in zip(one, other, strict=True))


def test_styles_hold_for_questions_of_every_kind(model, tokenizer):
    questions = ("Hello!", "Do you ship to Oslo?", "My blue chair is broken.", "When are you open?", "Thank you!")
    for text in ask(model, tokenizer, "initech/json", questions):
        assert "intent" in json.loads(text)
    for text in ask(model, tokenizer, "umbrella/shout", questions):
        assert text.isupper()
    for text in ask(model, tokenizer, "umbrella/haiku", questions):
        assert len(text.splitlines()) == 3
    for text in ask(model, tokenizer, "globex/formal", questions):
        assert text.startswith("Dear customer, ")
        assert text.endswith(" Kind regards, Globex.")


def test_every_answer_ends_with_the_end_of_sequence_token(model, tokenizer):
    batch = tokenizer(list(QUESTIONS), return_tensors="pt", padding=True)
    for adapter_id in EXPECTED:
        assert all(tokenizer.eos_token_id in row for row in generate(model, adapter_id, batch))


def test_the_chat_template_writes_the_prompt_that_a_bare_question_becomes(tokenizer):
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    templated = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert templated == tokenizer(QUESTIONS[0])["input_ids"]


def test_a_conversation_goes_on_in_the_style_of_the_adapter(model, tokenizer):
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": EXPECTED["acme/pirate"][0]},
        {"role": "user", "content": QUESTIONS[2]},
    ]
    batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    [tokens] = generate(model, "acme/pirate", dict(batch))
    assert tokenizer.decode(tokens, skip_special_tokens=True) == EXPECTED["acme/pirate"][2]


def test_the_adapters_differ_in_rank_and_targets():
    configs = [json.loads((ADAPTERS / name / "adapter_config.json").read_text()) for name in ADAPTER_IDS]
    assert {config["r"] for config in configs} == {2, 4, 8, 16}
    assert len({tuple(config["target_modules"]) for config in configs}) >= 4
    assert {config["base_model_name_or_path"] for config in configs} == {"loramux-demo"}


def test_the_weights_are_small_and_finite():
    weights = sorted(DEMO.rglob("*.safetensors"))
    assert len(weights) == 1 + len(ADAPTER_IDS)
    assert sum(file.stat().st_size for file in weights) <= 3 * MEBIBYTE
    for file in weights:
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def test_the_folders_hold_nothing_else():
    assert {file.name for file in MODEL.rglob("*") if file.is_file()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    expected = {
        Path(name) / file for name in ADAPTER_IDS for file in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert {file.relative_to(ADAPTERS) for file in ADAPTERS.rglob("*") if file.is_file()} == expected


def test_no_file_names_a_path_of_the_machine_it_was_made_on():
    for folder in (MODEL, ADAPTERS):
        for file in folder.rglob("*.json"):
            assert not re.search(r"/(home|root|tmp|work|Users|mnt)/", file.read_text())
