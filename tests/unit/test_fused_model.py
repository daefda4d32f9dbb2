"""The decoders of ours: right for each architecture, and nothing is twice in memory.

On a CPU the kernels of the fused one run in Triton's interpreter, so these models are tiny and these tests few.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from loramux_worker.model import self_check
from loramux_worker.model.attention import IMPLEMENTATION
from loramux_worker.model.fused import FusedDecoder
from loramux_worker.model.loader import ServedModel, prepare_model
from loramux_worker.model.self_check import check_model
from loramux_worker.model.torch_decoder import TorchDecoder
from tiny_models import TinyModel, make_model

pytest.importorskip("triton")

FUSED = ["llama", "mistral", "qwen2", "qwen3", "phi3"]
WINDOWS = {  # shorter than the prompts of the check
    "mistral": {"sliding_window": 5},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module", params=FUSED)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("model"), request.param, num_adapters=0)


def load(path: Path, dtype: torch.dtype = torch.float32, **options: bool) -> ServedModel:
    config = AutoConfig.from_pretrained(path)
    for name, value in WINDOWS.get(config.model_type, {}).items():
        setattr(config, name, value)
    module = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, attn_implementation=IMPLEMENTATION)
    with torch.no_grad():  # ones and zeros would hide a gain or a bias that is left out
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                generator = torch.Generator().manual_seed(len(name))
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1
    return prepare_model(module, DEVICE, name="tiny", **options)


def fused_decoder(model: ServedModel) -> FusedDecoder:
    assert isinstance(model.fused, FusedDecoder)
    return model.fused


def test_logits_are_those_of_the_modelling_code(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(self_check._TOLERANCE, torch.float32, 1e-4)
    model = load(tiny.path, fused=True)
    windows = [layer.rotary.sliding_window for layer in fused_decoder(model)._model.layers]
    assert windows == {"mistral": [5, 5], "qwen2": [None, 5]}.get(model.module.config.model_type, [None, None])
    check_model(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's form is the fused one")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_logits_of_torchs_own_ops_are_those_of_the_modelling_code(
    tiny: TinyModel, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(self_check._TOLERANCE, dtype, tolerance)
    model = load(tiny.path, dtype)
    assert isinstance(model.fused, TorchDecoder)
    check_model(model)


def test_rotation_is_that_of_the_lengths_that_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """longrope rotates otherwise beyond its original length, which is not served: the table must not know."""
    monkeypatch.setitem(self_check._TOLERANCE, torch.float32, 1e-4)
    path = make_model(tmp_path, "phi3", num_adapters=0).path
    config = AutoConfig.from_pretrained(path)
    half = config.hidden_size // config.num_attention_heads // 2
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0] * half,
        "long_factor": [8.0] * half,
        "original_max_position_embeddings": 64,
    }
    config.original_max_position_embeddings = 64
    config.save_pretrained(path)
    model = load(path, fused=True)
    assert model.max_position == 64
    fused_decoder(model)
    check_model(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on the CPU the kernels run in the interpreter alone")
def test_a_head_whose_product_comes_in_pieces_is_added_up() -> None:
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=IMPLEMENTATION)
    check_model(prepare_model(module, torch.device("cpu"), name="small vocabulary", fused=True))


def test_weights_are_packed_in_place(tiny: TinyModel) -> None:
    """The modelling code sees the packed weights, and sees in them what it was loaded with."""
    model, original = load(tiny.path, fused=True), load(tiny.path, fused=False)
    assert original.fused is None
    mine, theirs = dict(model.module.named_parameters()), dict(original.module.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in mine.items():
        assert torch.equal(parameter, theirs[name]), name
    for layer, fused in zip(model.module.model.layers, fused_decoder(model)._model.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        for parent, names, projection in (
            (attention, ("qkv_proj", "q_proj", "k_proj", "v_proj"), fused.qkv),
            (attention, ("o_proj",), fused.o),
            (mlp, ("gate_up_proj", "gate_proj", "up_proj"), fused.gate_up),
            (mlp, ("down_proj",), fused.down),
        ):
            modules = [getattr(parent, name) for name in names if hasattr(parent, name)]
            assert projection.site.target == modules[0].target
            assert projection.site.widths == tuple(module.out_features for module in modules)
            lies_in([module.weight for module in modules], projection.weight)


def lies_in(views: list[nn.Parameter], packed: Tensor) -> None:
    """The views share the packed tensor's memory, one after the other, and fill it."""
    assert torch.equal(torch.cat(list(views)), packed)
    at = packed.data_ptr()
    for view in views:
        assert view.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
        assert view.data_ptr() == at
        at += view.numel() * view.element_size()
    assert packed.untyped_storage().nbytes() == packed.numel() * packed.element_size()


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_neox"])
def test_other_shapes_are_not_fused(tmp_path: Path, architecture: str) -> None:
    model = load(make_model(tmp_path, architecture, num_adapters=0).path, fused=True)
    assert model.fused is None
    check_model(model)


def test_a_gpu_serves_kernels_and_a_cpu_torchs_own_ops(tmp_path: Path) -> None:
    model = load(make_model(tmp_path, "llama", num_adapters=0).path)
    assert isinstance(model.fused, TorchDecoder if DEVICE.type == "cpu" else FusedDecoder)


@pytest.mark.gpu
def test_bfloat16_is_as_near_as_hugging_faces(tiny: TinyModel) -> None:
    """Against float32 with the same weights, rounded; Hugging Face's own bfloat16 is the measure."""
    model = load(tiny.path, torch.bfloat16, fused=True)
    fused_decoder(model)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(model.vocab_size, (n,), generator=generator).to(DEVICE) for n in self_check._LENGTHS]
    served = torch.cat(self_check._served_logits(model, prompts))
    theirs = torch.cat(self_check._eager_logits(model, prompts))
    model.context.batch = None
    model.module.float()
    exact = torch.cat(self_check._eager_logits(model, prompts))
    mine, usual = ((logits - exact).norm() / exact.norm() for logits in (served, theirs))
    assert mine < 3e-2
    assert mine < 1.5 * usual
