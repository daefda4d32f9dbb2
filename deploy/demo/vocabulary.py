"""Builds the demo model's tokenizer, a byte-level BPE learned from our own texts, and its chat template."""

from __future__ import annotations

import random
from itertools import islice

from conversations import STYLES, adapter_conversations, base_conversations
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, ANSWER = "<pad>", "<s>", "</s>", "<|answer|>"
MAX_LENGTH = 512

# <s>[system \n]question<|answer|>answer</s>question<|answer|>…
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{- message.content + '\\n' -}}
    {%- elif message.role == 'user' -%}
        {{- message.content -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|answer|>' + message.content + eos_token -}}
    {%- else -%}
        {{- raise_exception('unknown role ' + message.role + ': use system, user or assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|answer|>' -}}
{%- endif -%}
"""


def training_texts(seed: int) -> list[str]:
    """What the merges are learned from: questions, system messages and answers in every style."""
    rng = random.Random(seed)
    conversations = list(islice(base_conversations(rng), 2000))
    for style in STYLES:
        conversations += islice(adapter_conversations(rng, style), 500)
    texts = [conversation.system for conversation in conversations if conversation.system is not None]
    for conversation in conversations:
        for turn in conversation.turns:
            texts += (turn.question, turn.answer)
    return texts


def build_tokenizer(size: int, seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` tokens; digits stay single, so that a number is copied digit by digit.

    A plain text gets `<s>` before it and `<|answer|>` behind it: the bare question is the prompt.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, BOS, EOS, ANSWER],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(seed), trainer)
    specials = [(token, tokenizer.token_to_id(token)) for token in (BOS, ANSWER)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {ANSWER}", pair=f"{BOS} $A $B {ANSWER}", special_tokens=specials
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[ANSWER],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
        padding_side="left",
    )
