"""`loramux adapters check`: the verdicts are a worker's, without the model's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from adapters_cli import SilentServer, run
from bad_adapters import CONFIG, WEIGHTS, make_bad_adapters
from loramux_worker.adapters.adapter_plan import AdapterLimits
from loramux_worker.adapters.base_weights import BaseWeights
from loramux_worker.adapters.peft_format import read_adapter
from loramux_worker.adapters.revisions import digest_folder, revision_of
from loramux_worker.errors import RequestFailed
from loramux_worker.model.loader import load_model
from tiny_models import TinyModel, make_model, save_adapter, save_tokenizer, save_trained_adapter

MAX_RANK = 64


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("check"), "llama", num_adapters=4)


@pytest.fixture(scope="module")
def bad(tiny: TinyModel) -> list[str]:
    return sorted(make_bad_adapters(tiny, max_rank=MAX_RANK))


@pytest.fixture
def uri(tiny: TinyModel) -> str:
    return f"file://{tiny.adapters}/{{adapter_id}}"


def with_copies(tiny: TinyModel, folder: Path, **changed: torch.Tensor) -> Path:
    """An adapter of the head that brings the base model's embedding and head, as PEFT saves them."""
    save_adapter(tiny.path, folder, ["lm_head"], rank=2)
    tensors = load_file(folder / WEIGHTS)
    base = load_file(tiny.path / "model.safetensors")
    embedding = base["model.embed_tokens.weight"]
    tensors["base_model.model.model.embed_tokens.weight"] = embedding
    tensors["base_model.model.lm_head.base_layer.weight"] = base.get("lm_head.weight", embedding).clone()
    save_file({**tensors, **changed}, folder / WEIGHTS)
    return folder


def test_ids_of_a_store_as_tables(tiny: TinyModel, uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(capsys, "check", *tiny.adapter_ids, "--model", tiny.path, "--adapter-uri", uri)
    assert outcome.code == 0
    assert outcome.err == ""
    for adapter_id in tiny.adapter_ids:
        files = digest_folder(tiny.adapters / adapter_id)
        revision = revision_of(file for file in files if file.name in (CONFIG, WEIGHTS))
        assert f"{adapter_id}  {revision}\n" in outcome.out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in outcome.out.splitlines() if "│" in line]
    # q: (64 + 64) × 4 elements, v: (64 + 32) × 4, two layers, bfloat16
    assert rows[0] == ["q_proj", "0-1", "4", "8", "2", "2.0 KiB"]
    assert rows[1] == ["v_proj", "0-1", "4", "8", "2", "1.5 KiB"]
    assert rows[2] == ["4 in bfloat16", "", "max 4", "", "", "3.5 KiB"]


def test_a_folder_as_json(tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(
        tiny.path, tmp_path / "mixed", ["q_proj", "lm_head"], rank=4, rank_pattern={"layers.1.self_attn.q_proj": 9},
        alpha_pattern={"lm_head": 5}, use_rslora=True,
    )  # fmt: skip
    outcome = run(capsys, "check", tmp_path / "mixed", "--model", tiny.path, "--dtype", "float32", "--json")
    assert outcome.code == 0
    document = json.loads(outcome.out)
    [report] = document.pop("adapters")
    assert document == {"model": str(tiny.path), "dtype": "float32"}
    queries, head = report.pop("modules")
    assert (queries["module"], queries["count"], queries["layers"], queries["ranks"]) == ("q_proj", 2, [0, 1], [4, 9])
    assert queries["alphas"] == [8]
    assert queries["scalings"] == pytest.approx([8 / 3, 4])
    assert queries["bytes"] == (4 + 9) * (64 + 64) * 4
    assert (head["module"], head["layers"], head["alphas"], head["scalings"]) == ("lm_head", [], [5], [2.5])
    assert head["bytes"] == 4 * (64 + 320) * 4
    num_bytes = queries["bytes"] + head["bytes"]
    assert report == {
        "adapter": str(tmp_path / "mixed"),
        "served": True,
        "revision": None,
        "rank": 9,
        "bytes": num_bytes,
        "own": {},
        "text": None,
    }


def test_the_text_that_an_adapter_brings(tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tiny.adapters / tiny.adapter_ids[0]
    folders = [Path(shutil.copytree(good, tmp_path / name)) for name in ("same", "grown", "other")]
    tokenizer = AutoTokenizer.from_pretrained(tiny.path)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.eos_token = "<t7>"
    tokenizer.save_pretrained(folders[0])
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folders[1])
    (folders[1] / "chat_template.jinja").unlink()
    (folders[1] / "generation_config.json").write_text('{"eos_token_id": 300}')
    save_tokenizer(folders[2], vocab_size=300)
    outcome = run(capsys, "check", *folders, "--model", tiny.path)
    assert outcome.code == 1
    text = [line for line in outcome.out.splitlines() if line.startswith(("text:", "  tokenizer:", "refused:"))]
    assert text[:4] == [
        "text: chat_template.jinja, tokenizer.json, tokenizer_config.json",
        "  tokenizer: its own, the same tokens; chat template: its own; ends with: </s> (257), <t7> (265)",
        "text: generation_config.json, tokenizer.json, tokenizer_config.json",
        "  tokenizer: its own, 1 tokens more; chat template: the model's; ends with: <t42> (300), <t7> (265)",
    ]
    assert "the vocabulary of its tokenizer is not the model's: '<t42>', token 300 of the model, is no token" in text[4]
    outcome = run(capsys, "check", folders[0], "--model", tiny.path, "--json")
    assert json.loads(outcome.out)["adapters"][0]["text"] == {
        "files": ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"],
        "tokenizer": "its own, the same tokens",
        "chat_template": "its own",
        "eos_token_ids": [257, 265],
    }


def test_refusals_are_those_of_a_worker(
    tiny: TinyModel, bad: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = load_model(str(tiny.path), "cpu", "bfloat16")
    limits = AdapterLimits(MAX_RANK, torch.bfloat16, "llama-tiny", BaseWeights.of_model(model.module))
    changed = {"base_model.model.model.embed_tokens.weight": torch.zeros(320, 64)}
    resized = {"base_model.model.model.embed_tokens.weight": torch.zeros(321, 64)}
    folders = [
        *(tiny.adapters / adapter_id for adapter_id in bad),
        with_copies(tiny, tmp_path / "changed", **changed),
        with_copies(tiny, tmp_path / "resized", **resized),
    ]
    common = ("--model", tiny.path, "--max-lora-rank", MAX_RANK, "--model-name", "llama-tiny")
    outcome = run(capsys, "check", *folders, *common, "--json")
    assert outcome.code == 1
    for folder, report in zip(folders, json.loads(outcome.out)["adapters"], strict=True):
        with pytest.raises(RequestFailed) as refused:
            read_adapter(folder, model.targets, limits)
        code, reason = refused.value.code.value, refused.value.message
        assert report == {"adapter": str(folder), "served": False, "code": code, "reason": reason}


def test_good_ones_are_shown_beside_refused_ones(
    tiny: TinyModel, bad: list[str], uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tiny.adapter_ids[0]
    names = ("bad/nan", good, "no/such", "bad/pickle")
    outcome = run(capsys, "check", *names, "--model", tiny.path, "--adapter-uri", uri)
    assert outcome.code == 1
    refused = [line for line in outcome.out.splitlines() if line.startswith("refused: ")]
    assert [line.split(": ")[1] for line in refused] == ["bad/nan", "no/such", "bad/pickle"]
    assert "NaN" in refused[0]
    assert refused[1].endswith("there is no adapter 'no/such' in the store (adapter_not_found)")
    assert "pickle" in refused[2]
    assert f"{good}  sha256:" in outcome.out


def test_copies_of_the_embedding_are_compared_with_the_files(
    tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tied = make_model(tmp_path, "qwen2", num_adapters=0)
    for model in (tiny, tied):
        folder = with_copies(model, tmp_path / f"copies-{model.path.name}")
        assert run(capsys, "check", folder, "--model", model.path).code == 0


def test_the_config_alone_will_do(tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(tiny.path / "config.json", tmp_path)
    good = tiny.adapters / tiny.adapter_ids[0]
    assert run(capsys, "check", good, "--model", tmp_path).code == 0
    folder = with_copies(tiny, tmp_path / "copies")
    run(capsys, "check", folder, "--model", tmp_path).assert_refused("--model", "model.safetensors")


def test_a_store_that_does_not_answer(tiny: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    with SilentServer() as server:
        uri = f"{server.url}/{{adapter_id}}"
        outcome = run(capsys, "check", "a", "--model", tiny.path, "--adapter-uri", uri, "--timeout", 0.3)
    assert outcome.code == 1
    assert outcome.out.startswith("refused: a: ")
    assert outcome.out.endswith("(adapter_unavailable)\n")


def test_wrong_options_are_one_line(
    tiny: TinyModel, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tiny.adapters / tiny.adapter_ids[0]
    run(capsys, "check", good).assert_refused("--model is required (or LORAMUX_MODEL)")
    run(capsys, "check", good, "--model", "no/such").assert_refused("--model no/such: there is no such folder")
    run(capsys, "check", "acme/x", "--model", tiny.path).assert_refused("acme/x: there is no such folder", "--adapter")
    run(capsys, "check", "a b", "--model", tiny.path, "--adapter-uri", uri).assert_refused("'a b' is not an adapter id")
    run(capsys, "check", "a", "--model", tiny.path, "--adapter-uri", "s3://x").assert_refused("{adapter_id}")
    run(capsys, "check", good, "--model", tmp_path).assert_refused(f"--model {tmp_path}")
    config = json.loads((tiny.path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run(capsys, "check", good, "--model", tmp_path).assert_refused("is quantised (gptq)")


def test_what_an_adapter_has_beside_lora_is_shown(
    tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "dora"
    save_trained_adapter(tiny.path, folder, ["q_proj", "v_proj"], use_dora=True, modules_to_save=["norm"])
    outcome = run(capsys, "check", folder, "--model", tiny.path)
    assert outcome.code == 0
    own = "q_proj.lora_magnitude_vector × 2, v_proj.lora_magnitude_vector × 2"
    assert f"beside LoRA: {own}" in outcome.out
    assert "norm.weight" in outcome.out
