"""`adapter_config.json` as PEFT writes it: what of it is served, and what is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramux_worker.adapters.invalid import AdapterInvalid, parse_object, quoted
from loramux_worker.adapters.name_patterns import PatternMatcher, ends_with_any
from loramux_worker.adapters.regular_file import open_regular, read_up_to
from loramux_worker.adapters.targets import TargetKind, TargetModule

CONFIG_FILE = "adapter_config.json"
_MAX_CONFIG_BYTES = 4 << 20
_OUTPUT_HEADS = ("lm_head", "embed_out")  # PEFT's all-linear leaves the output head out

# Fields that change what the adapter computes, in a way that is not served (yet).
_REFUSED = {
    "lora_bias": "a bias on lora_B",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on parameters that are no module of their own",
    "ensure_weight_tying": "adapters tied between embedding and output head",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron layers",
}

# Inits that change the base model's weights. PEFT would redo that on loading; `save_pretrained` with
# `path_initial_model_for_weight_conversion` writes a plain LoRA instead, and `true` here.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")

# Fields that have no say in what a trained adapter computes.
_INERT = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "fan_in_fan_out",  # PEFT goes by the module's class, and corrects a flag that says otherwise
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)

_READ = frozenset(
    {
        "alpha_pattern",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    }
)
_BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Which modules an adapter is on, its rank and scaling on each. Methods take names of `named_modules()`."""

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    use_rslora: bool
    target_modules: str | frozenset[str]
    exclude_modules: str | frozenset[str]
    layers_to_transform: frozenset[int]  # empty: every layer
    layers_pattern: tuple[str, ...]
    base_model_name: str | None
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    trained_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # by the end of a module's name

    def trained_tokens_of(self, module: str) -> tuple[int, ...]:
        """The tokens whose vectors PEFT trains one by one in an embedding; "" stands for the model's own."""
        ends = (end for end in self.trained_tokens if module == end or module.endswith(f".{end}") or not end)
        return next((self.trained_tokens[end] for end in ends), ())

    def saves(self, parameter: str) -> bool:
        """Whether a parameter is of a module that PEFT trains as a whole, or of a part of one."""
        parts = parameter.split(".")[:-1]
        modules = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        return any(name.endswith(self.modules_to_save) for name in modules) if self.modules_to_save else False

    def trains_bias(self, parameter: str, *, is_target: bool) -> bool:
        """Whether a parameter is a bias that PEFT trains; `is_target`: of a module that has LoRA."""
        return parameter.endswith("bias") and (self.bias == "all" or (self.bias == "lora_only" and is_target))

    def rank_of(self, name: str, matcher: PatternMatcher) -> int:
        """The rank that the config promises for a module."""
        pattern = matcher.first_match(self.rank_pattern, name)
        return self.rank if pattern is None else self.rank_pattern[pattern]

    def scaling_of(self, name: str, rank: int, matcher: PatternMatcher) -> float:
        """alpha/rank, or alpha/√rank with rsLoRA, in float64."""
        pattern = matcher.first_match(self.alpha_pattern, name)
        alpha = self.alpha if pattern is None else self.alpha_pattern[pattern]
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def is_target(self, module: TargetModule, matcher: PatternMatcher) -> bool:
        """Whether PEFT would put the adapter on this module (`check_target_module_exists` in its source)."""
        name, targets, excluded = module.name, self.target_modules, self.exclude_modules
        if isinstance(excluded, str):
            if excluded and matcher.matches_whole(excluded, name):
                return False
        elif ends_with_any(name, excluded):
            return False
        if isinstance(targets, str):
            if targets.lower() == "all-linear":
                return module.kind is TargetKind.LINEAR and name.rpartition(".")[2] not in _OUTPUT_HEADS
            return matcher.matches_whole(targets, name)
        if name in targets or not self.layers_to_transform:
            return ends_with_any(name, targets)
        if not ends_with_any(name, targets):
            return False
        return matcher.layer_index(self.layers_pattern, name) in self.layers_to_transform


def read_config_text(folder: Path) -> bytes:
    """The bytes of `folder/adapter_config.json`. Raises AdapterInvalid: it is missing or very large."""
    with open_regular(folder, CONFIG_FILE) as file:
        data = read_up_to(file, _MAX_CONFIG_BYTES + 1, CONFIG_FILE)
    if len(data) > _MAX_CONFIG_BYTES:
        raise AdapterInvalid(f"{CONFIG_FILE} is larger than {_MAX_CONFIG_BYTES} bytes")
    return data


def parse_config(data: bytes) -> AdapterConfig:
    """Check an `adapter_config.json`.

    Raises:
        AdapterInvalid: it is wrong, no LoRA, or asks for something that is not served.
    """
    fields = parse_object(data, CONFIG_FILE)
    _refuse_what_is_not_served(fields)
    config = AdapterConfig(
        rank=_rank(fields.get("r"), "r"),
        alpha=_number(fields.get("lora_alpha"), "lora_alpha"),
        rank_pattern={k: _rank(v, "rank_pattern") for k, v in _mapping(fields, "rank_pattern").items()},
        alpha_pattern={k: _number(v, "alpha_pattern") for k, v in _mapping(fields, "alpha_pattern").items()},
        use_rslora=_flag(fields, "use_rslora"),
        target_modules=_modules(fields, "target_modules"),
        exclude_modules=_modules(fields, "exclude_modules"),
        layers_to_transform=_layers(fields),
        layers_pattern=_strings(fields, "layers_pattern"),
        base_model_name=_optional_string(fields, "base_model_name_or_path"),
        use_dora=_flag(fields, "use_dora"),
        modules_to_save=_strings(fields, "modules_to_save"),
        bias=_bias(fields),
        trained_tokens=_trained_tokens(fields),
    )
    if not config.target_modules:
        raise AdapterInvalid(f"{CONFIG_FILE}: target_modules is missing or empty")
    if config.layers_to_transform and isinstance(config.target_modules, str):
        raise AdapterInvalid(f"{CONFIG_FILE}: layers_to_transform needs a list of target_modules, not a pattern")
    if config.layers_pattern and not config.layers_to_transform:
        raise AdapterInvalid(f"{CONFIG_FILE}: layers_pattern needs layers_to_transform")
    return config


def _refuse_what_is_not_served(fields: dict[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        raise AdapterInvalid(f"{CONFIG_FILE}: peft_type is {quoted(fields.get('peft_type'))}, only LORA is served")
    for name, what in _REFUSED.items():
        if fields.get(name):
            raise AdapterInvalid(f"{CONFIG_FILE}: {name} is set: {what} is not served")
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise AdapterInvalid(
            f"{CONFIG_FILE}: init_lora_weights is {quoted(init)}, which changes the base model's weights: save the "
            "adapter with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    for name, value in fields.items():
        if value and name not in _READ and name not in _INERT:
            raise AdapterInvalid(f"{CONFIG_FILE}: {quoted(name)} is set, which is not known here")


def _wrong(name: str, value: object, wanted: str) -> AdapterInvalid:
    return AdapterInvalid(f"{CONFIG_FILE}: {name} is {quoted(value)}, not {wanted}")


def _rank(value: object, name: str) -> int:
    if type(value) is not int or value <= 0:
        raise _wrong(name, value, "a positive integer")
    return value


def _number(value: object, name: str) -> float:
    if type(value) not in (int, float):
        raise _wrong(name, value, "a number")
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _wrong(name, value, "a finite number")
    return number


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and type(value) is not bool:
        raise _wrong(name, value, "true or false")
    return bool(value)


def _optional_string(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and type(value) is not str:
        raise _wrong(name, value, "a string")
    return value


def _bias(fields: dict[str, Any]) -> str:
    value = fields.get("bias")
    if value is not None and value not in _BIASES:
        raise _wrong("bias", value, f"one of {', '.join(_BIASES)}")
    return value or "none"


def _trained_tokens(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    name = "trainable_token_indices"
    value = fields.get(name)
    by_module = value if type(value) is dict else {"": value} if value else {}
    for token_ids in by_module.values():
        if type(token_ids) is not list or not all(type(i) is int and i >= 0 for i in token_ids):
            raise _wrong(name, value, "a list of token ids, or one for each embedding")
        if len(set(token_ids)) < len(token_ids):
            raise _wrong(name, value, "free of repetitions")
    return {module: tuple(token_ids) for module, token_ids in by_module.items()}


def _mapping(fields: dict[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name)
    if value is None:
        return {}
    if type(value) is not dict:
        raise _wrong(name, value, "an object")
    return value


def _strings(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    value = fields.get(name)
    if value is None or value == "":
        return ()
    strings = [value] if type(value) is str else value
    if type(strings) is not list or not all(type(item) is str and item for item in strings):
        raise _wrong(name, value, "a string or a list of strings")
    return tuple(strings)


def _modules(fields: dict[str, Any], name: str) -> str | frozenset[str]:
    value = fields.get(name)
    return value if type(value) is str else frozenset(_strings(fields, name))


def _layers(fields: dict[str, Any]) -> frozenset[int]:
    value = fields.get("layers_to_transform")
    if value is None:
        return frozenset()
    layers = [value] if type(value) is int else value
    if type(layers) is not list or not all(type(layer) is int for layer in layers):
        raise _wrong("layers_to_transform", value, "an integer or a list of integers")
    return frozenset(layers)
