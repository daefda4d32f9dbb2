"""Random configs, headers and bytes: refused or read right, never another error, never a hang."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from adapter_folders import TARGETS, config, weights, write
from loramux_worker.adapters.adapter_config import AdapterConfig
from loramux_worker.adapters.adapter_plan import AdapterLimits
from loramux_worker.adapters.invalid import AdapterInvalid
from loramux_worker.adapters.name_patterns import PatternMatcher
from loramux_worker.adapters.peft_format import read_adapter

QUICK = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
GOOD = config(4, ["q_proj"], rank_pattern={"layers.0.self_attn.q_proj": 4}, use_rslora=False)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["q_proj", "LORA", "none", ".*", "F32", "BF16", "F16", "all-linear", "(", "[", "\\"]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, GOOD, weights(TARGETS, 4, ["q_proj"], seed=0))


def refused_or_right(folder: Path) -> None:
    try:
        adapter = read_adapter(folder, TARGETS, AdapterLimits(8, torch.float32))
    except AdapterInvalid:
        return
    for module in adapter.modules:
        target = TARGETS[module.target]
        assert module.a.shape == (module.rank, target.in_features)
        assert module.b.shape == (module.rank, target.out_features)
        assert bool(torch.isfinite(module.a).all() and torch.isfinite(module.b).all())


@settings(max_examples=200, **QUICK)
@given(
    changes=st.dictionaries(
        st.sampled_from([*GOOD, "alpha_pattern", "use_dora", "modules_to_save", "exclude_modules"]), values
    )
)
def test_configs(folder: Path, changes: dict[str, Any]) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({**GOOD, **changes}))
    refused_or_right(folder)


@settings(max_examples=200, **QUICK)
@given(data=st.data())
def test_headers(folder: Path, data: st.DataObject) -> None:
    path = folder / "adapter_model.safetensors"
    write(folder, GOOD, weights(TARGETS, 4, ["q_proj"], seed=0))
    file = path.read_bytes()
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    for key in data.draw(st.lists(st.sampled_from(sorted(header)), max_size=2)):
        if data.draw(st.booleans()) and isinstance(header[key], dict):
            header[key][data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))] = data.draw(values)
        else:
            header[key] = data.draw(values)
    if data.draw(st.booleans()):
        header[data.draw(st.text(max_size=30))] = data.draw(values)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + file[8 + length :])
    refused_or_right(folder)


@settings(max_examples=200, **QUICK)
@given(data=st.data())
def test_flipped_bytes(folder: Path, data: st.DataObject) -> None:
    write(folder, GOOD, weights(TARGETS, 4, ["q_proj"], seed=0))
    path = folder / data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 400) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]))
    refused_or_right(folder)


@settings(max_examples=60, **QUICK)
@given(first=st.binary(max_size=200), second=st.binary(max_size=200))
def test_any_bytes(folder: Path, first: bytes, second: bytes) -> None:
    (folder / "adapter_config.json").write_bytes(first)
    refused_or_right(folder)
    (folder / "adapter_config.json").write_text(json.dumps(GOOD))
    (folder / "adapter_model.safetensors").write_bytes(second)
    refused_or_right(folder)


NAMES = [target.name for target in TARGETS] + ["model.layers.11.mlp.experts.3.q_proj", "a", "x.q-proj"]
pieces = st.sampled_from(
    [
        *("model", "layers", ".", "0", "1", "11", "q_proj", "proj", "_proj", "self_attn", "lm_head", "a", "-", "x"),
        *("^", "$", r"\.", r"\d+", ".*", "(?:q|k)_proj", "[qk]", "|", "+", "?", "(q_proj)", "{1,2}", "(?!.*q)"),
    ]
)
patterns = st.lists(pieces, min_size=1, max_size=5).map("".join)


@settings(max_examples=300, **QUICK)
@given(keys=st.lists(patterns, max_size=4, unique=True), name=st.sampled_from(NAMES))
def test_patterns_match_as_in_peft(keys: list[str], name: str) -> None:
    try:
        found = get_pattern_key(keys, name)
    except re.error:
        return  # PEFT stops at the first bad pattern it meets, and so do we
    assert PatternMatcher().first_match(keys, name) == (found if found in keys else None)


@settings(max_examples=300, **QUICK)
@given(
    target_modules=patterns
    | st.lists(st.sampled_from([*NAMES, "q_proj", "layers.1", "attn.q_proj", "proj"]), max_size=3),
    exclude=st.none() | patterns | st.lists(st.sampled_from(["q_proj", *NAMES]), max_size=2),
    layers=st.none() | st.integers(0, 3) | st.lists(st.integers(0, 3), max_size=2),
    layers_pattern=st.none() | st.sampled_from(["layers", "h", "experts", "lay.*", "layers|h"]),
)
def test_targets_are_pefts(target_modules: Any, exclude: Any, layers: Any, layers_pattern: Any) -> None:
    if isinstance(target_modules, str):
        layers = None
    peft_config = SimpleNamespace(
        target_modules=target_modules,
        exclude_modules=exclude,
        layers_to_transform=layers,
        layers_pattern=layers_pattern if layers is not None else None,
        modules_to_save=None,
        target_parameters=None,
    )
    as_set = [layers] if isinstance(layers, int) else layers or []
    ours = AdapterConfig(
        rank=1,
        alpha=1.0,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        target_modules=target_modules if isinstance(target_modules, str) else frozenset(target_modules),
        exclude_modules=exclude if isinstance(exclude, str) else frozenset(exclude or ()),
        layers_to_transform=frozenset(as_set),
        layers_pattern=(layers_pattern,) if layers_pattern else (),
        base_model_name=None,
    )
    for target in TARGETS:
        try:
            expected = check_target_module_exists(peft_config, target.name)
        except re.error:
            return
        assert ours.is_target(target, PatternMatcher()) == bool(expected), target


@pytest.mark.parametrize(
    "pattern",
    [
        "(.|a|m|o|[a-z])*[XY]",
        "((?:.|..|...)*)*[XY]",
        "(?:" * 40 + "a" + "{1,1000})" * 40,
        "(" * 5000 + ")" * 5000,
        "(?:[)]" * 30 + "a" + "{1,9})" * 30,
        "(?:\\)" * 30 + "a" + "{1,9})" * 30,
        "(?:[]])])" * 30 + "a" + "{1,9})" * 30,
        "(?x: # )\n" * 20 + "a" + "{1,9})" * 20,
        "(?:q_proj){e<=1}",
        "x" * 100_000,
    ],
    ids=lambda pattern: pattern[:20],
)
@pytest.mark.parametrize("field", ["rank_pattern", "target_modules"])
def test_hostile_patterns_end_soon(folder: Path, pattern: str, field: str) -> None:
    changed = {**GOOD, field: {pattern + "+": 4} if field == "rank_pattern" else pattern}
    (folder / "adapter_config.json").write_text(json.dumps(changed))
    started = time.process_time()
    with pytest.raises(AdapterInvalid, match="the pattern"):
        read_adapter(folder, TARGETS, AdapterLimits(8, torch.float32))
    assert time.process_time() - started < 5


def test_very_many_patterns_end_soon(folder: Path) -> None:
    changed = {**GOOD, "rank_pattern": {f"a.b{i}": 4 for i in range(150_000)}}
    (folder / "adapter_config.json").write_text(json.dumps(changed))
    started = time.process_time()
    refused_or_right(folder)
    assert time.process_time() - started < 10
