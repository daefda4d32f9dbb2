"""`loramux adapters merge`: the merged model says what PEFT says with the adapter."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters_cli import interrupted_when, run
from loramux_worker.model import merge as merging
from loramux_worker.text.adapter_text import AdapterText
from loramux_worker.text.tokenizer import Tokenizer
from tiny_models import TinyModel, make_model, save_adapter, save_tokenizer, save_trained_adapter

# which of make_model's adapters can be merged: two layers' worth of targets, and where not tied the head and embedding
MERGEABLE = {"llama": (1, 2, 3), "qwen2": (0, 1), "phi3": (1, 2), "gpt_neox": (1, 2), "gpt2": (1,)}
PROMPT = [65, 66, 67, 68, 69]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    root = tmp_path_factory.mktemp("merge")
    counts = {"llama": 4, "qwen2": 4, "phi3": 3, "gpt_neox": 3, "gpt2": 2}
    return {name: make_model(root, name, num_adapters=counts[name]) for name in MERGEABLE}


@pytest.fixture
def llama(models: dict[str, TinyModel]) -> TinyModel:
    return models["llama"]


def greedy(folder: Path) -> list[int]:
    return TinyModel(folder, folder, ()).reference().generate(PROMPT, None, 24)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("architecture", sorted(MERGEABLE))
def test_tokens_are_those_of_peft(
    models: dict[str, TinyModel], architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = models[architecture]
    reference = tiny.reference()
    base = reference.generate(PROMPT, None, 24)
    for number in MERGEABLE[architecture]:
        adapter_id, out = tiny.adapter_ids[number], tmp_path / f"merged-{number}"
        outcome = run(capsys, "merge", tiny.adapters / adapter_id, "--model", tiny.path, "--out", out)
        assert (outcome.code, outcome.err) == (0, "")
        wanted = reference.generate(PROMPT, adapter_id, 24)
        assert wanted != base
        assert greedy(out) == wanted
        assert AutoTokenizer.from_pretrained(out).encode("Hi") == AutoTokenizer.from_pretrained(tiny.path).encode("Hi")


def test_names_of_files_tensors_and_config_stay(
    models: dict[str, TinyModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, out = models["gpt_neox"], tmp_path / "out"
    (tiny.path / "README.md").write_text("the card of the base model")
    run(capsys, "merge", tiny.adapters / tiny.adapter_ids[2], "--model", tiny.path, "--out", out)
    before, after = digests(tiny.path), digests(out)
    assert {name for name in before if before[name] != after.get(name)} == {"README.md", "model.safetensors"}
    old, new = (load_file(folder / "model.safetensors") for folder in (tiny.path, out))
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    # transformers calls the head lm_head, the file embed_out
    assert {name.split(".")[-2] for name in changed} == {"dense_4h_to_h", "embed_out"}


def test_shards_keep_their_names_and_pieces_change_nothing(
    llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = llama.adapters / llama.adapter_ids[2]
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(llama.path).save_pretrained(sharded, max_shard_size="100KB")
    monkeypatch.setattr(merging, "PIECE_ELEMENTS", 1000)  # a few rows at a time
    for source, out in ((llama.path, tmp_path / "a"), (sharded, tmp_path / "b")):
        assert run(capsys, "merge", adapter, "--model", source, "--out", out).code == 0
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index == json.loads((sharded / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "a" / "model.safetensors")
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "b" / file)[name], whole[name])


def test_an_id_of_a_store_in_another_dtype(
    llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter_id, out = llama.adapter_ids[1], tmp_path / "deep" / "out"
    common = ("--model", llama.path, "--adapter-uri", f"file://{llama.adapters}/{{adapter_id}}")
    outcome = run(capsys, "merge", adapter_id, *common, "--out", out, "--dtype", "bfloat16")
    assert outcome.code == 0
    assert outcome.out.startswith(f"{adapter_id} (sha256:")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert run(capsys, "merge", adapter_id, *common, "--out", tmp_path / "same").code == 0
    exact = load_file(tmp_path / "same" / "model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, exact[name].to(torch.bfloat16))  # rounded once, from float32
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "names", [("chat_template.jinja",), ("generation_config.json",), ("tokenizer_config.json",), ()]
)
def test_the_text_of_the_adapter_goes_with_it(
    llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, ...]
) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(llama.adapters / llama.adapter_ids[1], adapter)
    text = tmp_path / "text"
    tokenizer = AutoTokenizer.from_pretrained(llama.path)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{{ eos_token }}{% endfor %}"
    tokenizer.eos_token = "<t7>"
    tokenizer.save_pretrained(text)
    (text / "generation_config.json").write_text('{"eos_token_id": [300, 301], "temperature": 0.5}')
    for path in text.iterdir():
        if not names or path.name in names:
            shutil.copy(path, adapter)
    assert run(capsys, "merge", adapter, "--model", llama.path, "--out", out).code == 0
    served = AdapterText(adapter).tokenizer(Tokenizer.load(str(llama.path)), str(llama.path))
    merged = Tokenizer.load(str(out))
    messages = [{"role": "user", "content": "Hi<t7>"}]
    assert merged.encode_messages(messages) == served.encode_messages(messages)
    assert merged.eos_token_ids == served.eos_token_ids
    assert merged.is_special(265) == served.is_special(265)
    if not names:
        theirs = AutoTokenizer.from_pretrained(out)
        assert theirs.apply_chat_template(messages, return_dict=False) == served.encode_messages(messages)
        assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.5


def test_text_of_another_model_is_refused(llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(llama.adapters / llama.adapter_ids[1], adapter)
    save_tokenizer(adapter, vocab_size=300)
    outcome = run(capsys, "merge", adapter, "--model", llama.path, "--out", out)
    outcome.assert_refused(str(adapter), "the vocabulary of its tokenizer is not the model's")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_tied_embedding_is_refused(
    models: dict[str, TinyModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = models["qwen2"]
    for number, module in ((2, "lm_head"), (3, "model.embed_tokens")):
        adapter = tiny.adapters / tiny.adapter_ids[number]
        outcome = run(capsys, "merge", adapter, "--model", tiny.path, "--out", tmp_path / "out")
        outcome.assert_refused(f"the adapter touches {module}, whose weights this model shares")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(
    llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = llama.adapters / llama.adapter_ids[0], tmp_path / "out"
    arguments = ("merge", adapter, "--model", llama.path, "--out")
    out.mkdir()
    assert run(capsys, *arguments, out).code == 0  # empty: nothing is lost
    (out / "mine").touch()
    before = digests(out)
    run(capsys, *arguments, out).assert_refused("--out", "is not empty", "--overwrite")
    run(capsys, *arguments, out / "mine", "--overwrite").assert_refused("is a file")
    assert digests(out) == before
    assert run(capsys, *arguments, out, "--overwrite").code == 0
    assert not (out / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for place in (llama.path, llama.path.parent):
        run(capsys, *arguments, place, "--overwrite").assert_refused("the base model is there")


def test_what_is_wrong_is_one_line_and_leaves_nothing(
    llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, out = llama.adapters / llama.adapter_ids[0], tmp_path / "out"
    save_adapter(llama.path, tmp_path / "bad", ["q_proj"], rank=2)
    config = tmp_path / "bad" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_bias": True}))
    run(capsys, "merge", tmp_path / "bad", "--model", llama.path, "--out", out).assert_refused(
        "lora_bias", "a bias on lora_B"
    )
    huge = tmp_path / "huge"
    save_adapter(llama.path, huge, ["q_proj"], rank=2)
    tensors = load_file(huge / "adapter_model.safetensors")
    save_file({name: tensor * 1e4 for name, tensor in tensors.items()}, huge / "adapter_model.safetensors")
    arguments = ("merge", huge, "--model", llama.path, "--out", out)
    run(capsys, *arguments, "--dtype", "float16").assert_refused("too large for F16", "--dtype bfloat16")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((llama.path / "config.json").read_bytes())
    arguments = ("merge", good, "--model", model, "--out", out)
    run(capsys, *arguments).assert_refused("has neither model.safetensors nor model.safetensors.index.json")
    (model / "model.safetensors").write_bytes((llama.path / "model.safetensors").read_bytes()[:-1])
    run(capsys, *arguments).assert_refused("is truncated or no safetensors file")
    save_file({"x": torch.ones(1)}, model / "model.safetensors")
    run(capsys, *arguments).assert_refused("do not hold model.layers.0.self_attn.q_proj.weight")
    assert {path.name for path in tmp_path.iterdir()} == {"bad", "huge", "model"}


# the signal may land between open and with, and then nobody but the collector closes the file
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_leaves_nothing(llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    (model / "config.json").write_bytes((llama.path / "config.json").read_bytes())
    _save_with_much_more(llama.path / "model.safetensors", model / "model.safetensors", 2 << 30)
    adapter = llama.adapters / llama.adapter_ids[0]

    def is_writing() -> bool:
        return any(tmp_path.glob(".out.merging/*/*/model.safetensors"))

    with interrupted_when(is_writing):
        outcome = run(capsys, "merge", adapter, "--model", model, "--out", out)
    assert (outcome.code, outcome.out) == (130, "")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _save_with_much_more(source: Path, destination: Path, num_bytes: int) -> None:
    """The same tensors and one of zeros that takes a while to copy, and no disk."""
    data = source.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    header["more"] = {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": [end, end + num_bytes]}
    text = json.dumps(header).encode()
    with destination.open("wb") as sink:
        sink.write(struct.pack("<Q", len(text)) + text + data[8 + length :])
        sink.truncate(sink.tell() + num_bytes)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {"targets": ["q_proj", "down_proj"], "use_dora": True}),
        ("llama", {"targets": ["embed_tokens", "v_proj"], "use_dora": True}),
        ("llama", {"targets": ["q_proj"], "modules_to_save": ["norm", "lm_head"]}),
        ("phi3", {"targets": ["qkv_proj", "lm_head"], "use_dora": True}),
        ("qwen2", {"targets": ["q_proj"], "use_dora": True, "bias": "all"}),
        ("llama", {"targets": ["q_proj"], "trainable_token_indices": [65, 3, 69]}),
        ("qwen2", {"targets": ["q_proj"], "trainable_token_indices": [65, 66]}),
        ("gpt2", {"targets": ["c_attn", "c_proj"], "use_dora": True, "bias": "all"}),
        ("gpt2", {"targets": ["c_attn"], "modules_to_save": ["c_fc", "attn.c_proj"]}),
    ],
)
def test_what_an_adapter_has_beside_lora_is_merged_too(
    models: dict[str, TinyModel],
    architecture: str,
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(merging, "PIECE_ELEMENTS", 1000)
    model, adapter, out = models[architecture].path, tmp_path / "adapter", tmp_path / "out"
    save_trained_adapter(model, adapter, **settings)
    outcome = run(capsys, "merge", adapter, "--model", model, "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    wanted = TinyModel(model, tmp_path, ("adapter",)).reference().generate(PROMPT, "adapter", 24)
    assert wanted != greedy(model)
    assert greedy(out) == wanted
