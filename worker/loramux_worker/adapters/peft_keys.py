"""What each tensor of an adapter's file is: told from its name, and checked against config and model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loramux_worker.adapters.adapter_config import AdapterConfig
from loramux_worker.adapters.base_weights import BaseWeights
from loramux_worker.adapters.invalid import AdapterInvalid, quoted
from loramux_worker.adapters.layout import MAGNITUDE, TRAINED_TOKENS, OwnTensor
from loramux_worker.adapters.name_patterns import PatternMatcher
from loramux_worker.adapters.safetensors_file import TensorEntry
from loramux_worker.adapters.targets import TargetKind, TargetModule

_PREFIX = "base_model.model."
_PARTS = {  # and the kinds of modules that have them
    ".lora_A": ("A", {TargetKind.LINEAR}),
    ".lora_B": ("B", {TargetKind.LINEAR}),
    ".lora_embedding_A": ("A", {TargetKind.EMBEDDING}),
    ".lora_embedding_B": ("B", {TargetKind.EMBEDDING}),
    f".{MAGNITUDE}": (MAGNITUDE, {TargetKind.LINEAR, TargetKind.EMBEDDING}),
    f".token_adapter.{TRAINED_TOKENS}": (TRAINED_TOKENS, {TargetKind.EMBEDDING}),
}
_OPTIONAL = (".weight", ".default")  # what may follow; PEFT's habits have changed


@dataclass(frozen=True, slots=True)
class Source:
    """Where one module's weights are in the file, and what B is multiplied with."""

    target: int
    a: TensorEntry
    b: TensorEntry
    scaling: float


@dataclass(frozen=True, slots=True)
class Found:
    """The file's tensors by what they are.

    `parts` has A, B and magnitude by target; `own` what stands in place of a parameter of the model's, and `copies`
    what must equal one, by its name.
    """

    parts: dict[int, dict[str, TensorEntry]] = field(default_factory=dict)
    own: dict[str, TensorEntry] = field(default_factory=dict)
    copies: dict[str, TensorEntry] = field(default_factory=dict)


def sort_keys(
    entries: Mapping[str, TensorEntry],
    targets: Sequence[TargetModule],
    config: AdapterConfig,
    base_weights: BaseWeights | None,
    parameters: Mapping[str, tuple[int, ...]],
) -> Found:
    """Divide the file's tensors. Raises AdapterInvalid for one that is left over or there twice."""
    index = {target.name: i for i, target in enumerate(targets)}
    found = Found()
    for key, entry in entries.items():
        name = key.removeprefix(_PREFIX)
        module, part, kinds = _split(name)
        if part is None:
            _sort_parameter(found, name, entry, config, base_weights, parameters)
            continue
        if module not in index:
            raise AdapterInvalid(f"{quoted(key)} is for {quoted(module)}, which this model does not have or adapt")
        target = index[module]
        if targets[target].kind not in kinds:
            raise AdapterInvalid(f"{quoted(key)} does not fit {quoted(module)}, of kind {targets[target].kind}")
        parts = found.parts.setdefault(target, {})
        if part in parts:
            raise AdapterInvalid(f"{_name(part)} of {quoted(module)} is there twice")
        parts[part] = entry
    return found


def _split(name: str) -> tuple[str, str | None, set[TargetKind]]:
    """The module of a LoRA weight, which part of it and of what kinds that may be; no part: it is none."""
    stem = name
    for ending in _OPTIONAL:
        stem = stem.removesuffix(ending)
    for ending, (part, kinds) in _PARTS.items():
        if stem.endswith(ending):
            return stem.removesuffix(ending), part, kinds
    return name, None, set()


def _sort_parameter(
    found: Found,
    name: str,
    entry: TensorEntry,
    config: AdapterConfig,
    base_weights: BaseWeights | None,
    parameters: Mapping[str, tuple[int, ...]],
) -> None:
    """A tensor that is named as a parameter of the model: one of its own, or a copy (`save_embedding_layers`)."""
    parameter = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    is_own = parameter in parameters and (  # a name that is known is also a short one
        config.saves(parameter) or config.trains_bias(parameter, is_target=".base_layer." in name)
    )
    shape = parameters.get(parameter)
    if not is_own:
        shape = None if base_weights is None else base_weights.shape(parameter)
    if shape is None:
        raise AdapterInvalid(f"{quoted(entry.name)} is left over: not a LoRA weight of any module")
    if entry.shape != shape:
        raise AdapterInvalid(
            f"{quoted(entry.name)} has shape {list(entry.shape)}, the served model's {list(shape)}: a resized "
            "vocabulary is not served"
        )
    kept = found.own if is_own else found.copies
    if parameter in kept:
        raise AdapterInvalid(f"{quoted(parameter)} is there twice")
    kept[parameter] = entry


def match_to_config(
    found: Found,
    config: AdapterConfig,
    targets: Sequence[TargetModule],
    max_rank: int,
    parameters: Mapping[str, tuple[int, ...]],
    replaceable: frozenset[str],
) -> tuple[list[Source], list[tuple[OwnTensor, TensorEntry]]]:
    """Check every module's weights against config and model; the sources in target order, and what is not LoRA.

    Raises:
        AdapterInvalid: config, model and file do not say the same.
    """
    matcher = PatternMatcher()
    sources = []
    own = []
    for i, target in enumerate(targets):
        is_target = config.is_target(target, matcher)
        parts = dict(found.parts.get(i, {}))
        if (tokens := _take_trained_tokens(target, config, parts, is_target=is_target)) is not None:
            own.append(tokens)
        if not parts:
            if is_target and f"{target.name}.weight" not in found.own:
                raise AdapterInvalid(f"{quoted(target.name)} is a target module of the config and has no weights")
            continue
        if not is_target:
            raise AdapterInvalid(f"the weights of {quoted(target.name)} are left over: the config does not target it")
        if f"{target.name}.weight" in found.own:
            raise AdapterInvalid(f"{quoted(target.name)} has both LoRA and a weight of its own")
        sources.append(_source(i, target, parts, config, matcher, max_rank))
        if config.use_dora:
            own.append((OwnTensor(target.name, MAGNITUDE, (target.out_features,)), parts[MAGNITUDE]))
    if not sources:
        raise AdapterInvalid("its target_modules are none of this model's")
    if len(config.trained_tokens) > 1:
        raise AdapterInvalid("trainable_token_indices is for several modules: the embedding's are served")
    if config.trained_tokens and not any(tensor.parameter == TRAINED_TOKENS for tensor, _ in own):
        raise AdapterInvalid("trainable_token_indices is for another module than the model's embedding")
    saved = [parameter for parameter in parameters if config.saves(parameter)]
    if config.modules_to_save and not saved:
        raise AdapterInvalid(f"modules_to_save names none of this model's: {quoted(list(config.modules_to_save))}")
    for parameter in saved:
        if parameter not in found.own:
            raise AdapterInvalid(f"{quoted(parameter)} is among modules_to_save and has no weights")
    for parameter, entry in found.own.items():
        if parameter not in replaceable:
            raise AdapterInvalid(
                f"it brings its own {quoted(parameter)}, which is of no linear layer, embedding or norm over the "
                "hidden size: not served"
            )
        module, _, name = parameter.rpartition(".")
        own.append((OwnTensor(module, name, entry.shape), entry))
    return sources, own


def _take_trained_tokens(
    target: TargetModule, config: AdapterConfig, parts: dict[str, TensorEntry], *, is_target: bool
) -> tuple[OwnTensor, TensorEntry] | None:
    token_ids = config.trained_tokens_of(target.name) if target.kind is TargetKind.EMBEDDING else ()
    if not token_ids:
        return None
    if is_target:
        raise AdapterInvalid(f"{quoted(target.name)} has both LoRA and trained tokens")
    if max(token_ids) >= target.in_features:
        raise AdapterInvalid(f"trainable_token_indices has {max(token_ids)}, the model {target.in_features} tokens")
    entry, shape = parts.pop(TRAINED_TOKENS, None), (len(token_ids), target.out_features)
    if entry is None:
        raise AdapterInvalid(f"{TRAINED_TOKENS} of {quoted(target.name)} is missing")
    if entry.shape != shape:
        raise AdapterInvalid(f"{quoted(entry.name)} has shape {list(entry.shape)}, config and model say {list(shape)}")
    return OwnTensor(target.name, TRAINED_TOKENS, shape, token_ids), entry


def _name(part: str) -> str:
    return f"lora_{part}" if len(part) == 1 else part


def _source(
    index: int,
    target: TargetModule,
    parts: Mapping[str, TensorEntry],
    config: AdapterConfig,
    matcher: PatternMatcher,
    max_rank: int,
) -> Source:
    rank = config.rank_of(target.name, matcher)
    if rank > max_rank:
        raise AdapterInvalid(f"rank {quoted(rank)} of {quoted(target.name)} is above the limit of {max_rank}")
    shapes: dict[str, tuple[int, ...]] = {"A": (rank, target.in_features), "B": (target.out_features, rank)}
    if config.use_dora:
        shapes[MAGNITUDE] = (target.out_features,)
    for part, shape in shapes.items():
        if part not in parts:
            raise AdapterInvalid(f"{_name(part)} of {quoted(target.name)} is missing")
        if parts[part].shape != shape:
            raise AdapterInvalid(
                f"{quoted(parts[part].name)} has shape {quoted(list(parts[part].shape))}, config and model say "
                f"{list(shape)}"
            )
    if extra := parts.keys() - shapes.keys():
        raise AdapterInvalid(f"{extra.pop()} of {quoted(target.name)} is left over: the config does not ask for it")
    return Source(index, parts["A"], parts["B"], config.scaling_of(target.name, rank, matcher))
