"""Whether an adapter was made for another model than the one served, as far as names tell."""

from __future__ import annotations

import re

_HUB_ID = re.compile(r"(?:([A-Za-z0-9][\w.-]*)/)?([A-Za-z0-9][\w.-]*)")
_HUB_CACHE_FOLDER = re.compile(r"(?:^|/)models--([^/]+)--([^/]+)(?:/|$)")
_PLACES = frozenset(
    {
        "checkpoint",
        "checkpoints",
        "ckpt",
        "data",
        "model",
        "models",
        "out",
        "output",
        "outputs",
        "results",
        "runs",
        "tmp",
        "weights",
    }
)
_NO_NAME = re.compile(r"checkpoint-\d+|[0-9a-f]{40}|" + "|".join(_PLACES))
_VARIANTS = re.compile(r"(?:[-_.](?:unsloth|bnb|dynamic|[48]bit|int[48]|gptq|awq|gguf|fp8|fp16|bf16|hf))+$")


def is_other_model(adapter_base: str | None, served: str | None) -> bool:
    """Whether both look like names of models and differ.

    What counts is the last part of a hub id (`org/name` or `name`), lower case, without the endings of quantised or
    converted copies: an adapter trained on `unsloth/Llama-3.1-8B-bnb-4bit` fits `meta-llama/Llama-3.1-8B`. A local
    path says where somebody kept a model, not which it is, so it is never another model; the shapes still decide. A
    path into the hub's cache holds the hub id.
    """
    adapter_name, served_name = _model_name(adapter_base), _model_name(served)
    return None not in (adapter_name, served_name) and adapter_name != served_name


def _model_name(name_or_path: str | None) -> str | None:
    if name_or_path is None:
        return None
    if cached := _HUB_CACHE_FOLDER.search(name_or_path):
        return _VARIANTS.sub("", cached[2].lower()) or None
    hub_id = _HUB_ID.fullmatch(name_or_path)
    if hub_id is None:
        return None
    organisation, name = (hub_id[1] or "").lower(), hub_id[2].lower()
    if organisation in _PLACES or _NO_NAME.fullmatch(name):
        return None
    return _VARIANTS.sub("", name) or None
