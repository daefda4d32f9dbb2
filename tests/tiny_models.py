"""Small random models of several architectures, and adapters for them made with the PEFT library."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 320
_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
_GQA = {**_SHAPE, "num_key_value_heads": 2}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_GQA),
    "mistral": MistralConfig(**_GQA, sliding_window=24),
    "qwen2": Qwen2Config(**_GQA, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_GQA, head_dim=24),
    "gemma2": Gemma2Config(
        **_GQA,
        head_dim=16,
        sliding_window=20,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=400.0,
        tie_word_embeddings=False,
    ),
    "phi3": Phi3Config(**_GQA),
    "gpt_neox": GPTNeoXConfig(**_SHAPE),
    "gpt2": GPT2Config(**_SHAPE),  # layers of Conv1D, learnt positions
}

_TARGETS: dict[str, list[list[str]]] = {
    "phi3": [["qkv_proj"], ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], ["down_proj", "lm_head"]],
    "gpt_neox": [
        ["query_key_value"],
        ["query_key_value", "dense", "dense_h_to_4h"],
        ["dense_4h_to_h", "lm_head"],
    ],
    "gpt2": [["c_attn"], ["c_attn", "c_proj", "c_fc"], ["c_fc", "lm_head"], ["mlp.c_proj", "wte"]],
}
_LLAMA_TARGETS = [
    ["q_proj", "v_proj"],
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ["gate_proj", "down_proj", "lm_head"],
    ["o_proj", "embed_tokens"],
]


@dataclass(frozen=True)
class TinyModel:
    """A model folder and the folder of its adapters."""

    path: Path
    adapters: Path
    adapter_ids: tuple[str, ...]

    def reference(self) -> Reference:
        """The same model and adapters in PEFT, float32."""
        return Reference(self)


class Reference:
    """Hugging Face PEFT's own answers."""

    def __init__(self, tiny: TinyModel) -> None:
        # the definition of each architecture: others may leave out what they cannot do, such as Gemma's soft-cap
        model: Any = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32, attn_implementation="eager")
        self._base = model
        if tiny.adapter_ids:
            first, *rest = tiny.adapter_ids
            model = peft.PeftModel.from_pretrained(model, tiny.adapters / first, adapter_name=_name(first))
            for adapter_id in rest:
                model.load_adapter(tiny.adapters / adapter_id, adapter_name=_name(adapter_id))
        self._model = model.eval()

    @torch.inference_mode()
    def generate(self, prompt: list[int], adapter_id: str | None, max_new_tokens: int) -> list[int]:
        """Greedy tokens, the end-of-sequence token included."""
        ids = torch.tensor([prompt])
        kwargs = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
        }
        if adapter_id is None:
            if self._model is self._base:
                out = self._base.generate(ids, **kwargs)
            else:
                with self._model.disable_adapter():
                    out = self._model.generate(input_ids=ids, **kwargs)
        else:
            self._model.set_adapter(_name(adapter_id))
            out = self._model.generate(input_ids=ids, **kwargs)
        return out[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def logprobs(self, prompt: list[int]) -> torch.Tensor:
        """Log-probabilities of every token after the prompt, with the first adapter if there is one: [vocabulary]."""
        return self._model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)


def make_model(folder: Path, architecture: str, *, num_adapters: int = 4, seed: int = 0) -> TinyModel:
    """Save a random model of an architecture with its tokenizer and adapters of different ranks and targets."""
    torch.manual_seed(seed)
    config = CONFIGS[architecture].__class__(**CONFIGS[architecture].to_dict())
    path = folder / f"{architecture}-tiny"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # larger than the default, so that tokens and adapters differ visibly
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    model.save_pretrained(path)
    save_tokenizer(path)
    adapters = folder / f"{architecture}-adapters"
    targets = _TARGETS.get(architecture, _LLAMA_TARGETS)
    ids = []
    for i in range(num_adapters):
        adapter_id = f"tenant-{i}/tune"
        save_adapter(path, adapters / adapter_id, targets[i % len(targets)], rank=(4, 8, 1, 16, 3, 32)[i % 6], seed=i)
        ids.append(adapter_id)
    return TinyModel(path, adapters, tuple(ids))


def save_adapter(model: Path, folder: Path, targets: list[str], *, rank: int, seed: int = 0, **config: Any) -> None:
    """Save one PEFT adapter with random weights in both A and B."""
    torch.manual_seed(1000 + seed)
    lora = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **config,
    )
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = peft.get_peft_model(base, lora)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(folder, save_embedding_layers=False)


def save_trained_adapter(model: Path, folder: Path, targets: list[str] | str, *, seed: int = 0, **config: Any) -> None:
    """Save an adapter all of whose parameters differ from what they begin as."""
    torch.manual_seed(seed)
    lora = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **config)
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), lora)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.15
    tuned.save_pretrained(folder, save_embedding_layers=False)


def save_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """A byte-level tokenizer: a token a byte, then <s>, </s> and words to fill the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([f"<t{i}>" for i in range(vocab_size - 258)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "chat_template": "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] ",
            }
        )
    )


def kv_cache_bytes(model: Path, *, num_blocks: int, block_size: int) -> int:
    """Bytes of a float32 KV cache of that many blocks."""
    config = AutoConfig.from_pretrained(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return num_blocks * block_size * 2 * config.num_hidden_layers * heads * dim * 4


def _name(adapter_id: str) -> str:
    return adapter_id.replace("/", "-").replace(".", "-")
