"""Load a base model for serving: Hugging Face's modelling code with our attention and LoRA layers in it."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from loramux_worker.adapters.targets import TargetModule
from loramux_worker.errors import ConfigurationError
from loramux_worker.model.attention import IMPLEMENTATION, attach
from loramux_worker.model.context import StepBatch, StepContext
from loramux_worker.model.fused import FusedDecoder
from loramux_worker.model.lora_layers import add_lora_layers
from loramux_worker.model.own_layers import add_own_parameters
from loramux_worker.model.packed import pack
from loramux_worker.model.torch_decoder import TorchDecoder

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model ready to run packed batches."""

    module: nn.Module
    context: StepContext
    targets: tuple[TargetModule, ...]
    fused: FusedDecoder | TorchDecoder | None  # where there is one, it computes instead of `module`
    embedding_target: int
    head_target: int
    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int  # positions that the model can be right at
    device: torch.device
    dtype: torch.dtype

    @torch.inference_mode()
    def __call__(self, batch: StepBatch, out: Tensor | None = None) -> Tensor:
        """One forward pass over a packed batch.

        Args:
            out: [n, vocabulary] for the logits, where they are to lie at a fixed address.

        Returns:
            logits [n, vocabulary] of the rows that `batch` asks for.
        """
        self.context.batch = batch
        if self.fused is not None and not batch.own:
            return self.fused(batch, out)
        logits: Tensor = self.module(
            input_ids=batch.input_ids[None],
            position_ids=batch.positions.long()[None],
            use_cache=False,
            logits_to_keep=0 if batch.rows is None else batch.rows,
        ).logits[0]
        return logits if out is None else out.copy_(logits)

    @property
    def runs_kernels(self) -> bool:
        """Whether adapters are computed by kernels over the pool, not run by run."""
        return isinstance(self.fused, FusedDecoder) or self.device.type == "cuda"

    @property
    def edge_targets(self) -> tuple[int, int]:
        """The targets outside the decoder layers: token embedding and output head."""
        return self.embedding_target, self.head_target

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token's keys and values take over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


def load_model(path: str, device: str, dtype: str) -> ServedModel:
    """Read config and weights and prepare the model.

    Raises:
        ConfigurationError: there is no such model, or this architecture cannot be served rightly.
    """
    where = pick_device(device)
    config = read_model_config(path)
    refuse_unsupported(config)
    kind = pick_dtype(dtype, where, config)
    try:
        module = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=kind, attn_implementation=IMPLEMENTATION, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigurationError(f"--model {path}: cannot load its weights: {_one_line(error)}") from error
    return prepare_model(module, where, name=config._name_or_path or path)


def prepare_model(module: Any, device: torch.device, *, name: str, fused: bool | None = None) -> ServedModel:
    """Put our attention's context and LoRA layers into a model that was loaded with our attention.

    `fused`: whether to run our own form of it where there is one, in kernels; None: in kernels on a GPU, in torch's ops
    on a CPU.

    Raises:
        ConfigurationError: this architecture cannot be served rightly.
    """
    refuse_unsupported_model(module)
    module.eval().requires_grad_(False).to(device)
    context = StepContext()
    config = module.config
    text = config.get_text_config()
    num_layers = attach(module, context)
    if num_layers != text.num_hidden_layers:
        raise ConfigurationError(
            f"--model: {config.model_type} has {text.num_hidden_layers} layers but {num_layers} of attention: "
            "architectures with other kinds of layers are not served"
        )
    targets = add_lora_layers(module, context)
    add_own_parameters(module, context)
    return ServedModel(
        module=module,
        context=context,
        targets=targets,
        fused=None if fused is False else _decoder(module, context, kernels=fused or device.type == "cuda"),
        embedding_target=module.get_input_embeddings().target,
        head_target=module.get_output_embeddings().target,
        name=name,
        num_layers=num_layers,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab_size=module.get_output_embeddings().out_features,
        max_position=_max_position(text),
        device=device,
        dtype=module.dtype,
    )


def _decoder(module: Any, context: StepContext, *, kernels: bool) -> FusedDecoder | TorchDecoder | None:
    packed = pack(module, _max_position(module.config.get_text_config()))
    if packed is None:
        return None
    return FusedDecoder(packed, context) if kernels else TorchDecoder(packed, context)


def pick_device(device: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigurationError(f"--device {device}: say auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"--device {device}: torch sees no GPU here; say --device cpu")
    return chosen


def pick_dtype(dtype: str, device: torch.device, config: Any) -> torch.dtype:
    """`auto` is float32 on a CPU, on a GPU the 16-bit type that the weights are stored in, else bfloat16."""
    if dtype != "auto":
        return _DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    stored = getattr(config, "dtype", None)
    return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16


def read_model_config(path: str) -> Any:
    """The model's config. Raises ConfigurationError when there is none, or none that is known."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(f"--model {path}: {_one_line(error)}") from error


def refuse_unsupported(config: Any) -> None:
    """Refuse what the config alone shows cannot be right.

    Raises:
        ConfigurationError: one line that names the reason.
    """
    name = config.model_type
    if config.is_encoder_decoder:
        raise ConfigurationError(f"--model: {name} is an encoder-decoder; only decoder-only models are served")
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ConfigurationError(f"--model: {name} has layers of kind {', '.join(sorted(kinds))}, which is not served")


def refuse_unsupported_model(module: Any) -> None:
    """Refuse modelling code that does not take our attention or cannot leave out logits.

    Raises:
        ConfigurationError: one line that names the reason.
    """
    name = type(module).__name__
    if not getattr(module, "_supports_attention_backend", False):
        raise ConfigurationError(f"--model: {name} does not support attention backends in transformers: not served")
    if "logits_to_keep" not in inspect.signature(module.forward).parameters:
        raise ConfigurationError(f"--model: {name} cannot compute the logits of chosen rows: not served")


def _max_position(text: Any) -> int:
    """The longest context that is right in a packed batch.

    `dynamic` and `longrope` scale by the longest sequence of the whole batch, so that one long request would change
    the others: they are served up to the length at which no scaling sets in.
    """
    longest: int = text.max_position_embeddings
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    ropes = [r for r in rope.values() if isinstance(r, dict)] or [rope]
    for parameters in ropes:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings")
            original = original or getattr(text, "original_max_position_embeddings", None) or longest
            longest = min(longest, original)
    return longest


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
