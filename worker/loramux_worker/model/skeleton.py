"""A base model without its weights: what adapters are checked against, and where its tensors lie in its files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from loramux_worker.adapters.base_weights import PIECE_ELEMENTS, BaseWeights, parameter_shapes, replaceable_parameters
from loramux_worker.adapters.targets import TargetModule
from loramux_worker.errors import ConfigurationError
from loramux_worker.model.attention import IMPLEMENTATION
from loramux_worker.model.checkpoint import Checkpoint, StoredTensor
from loramux_worker.model.loader import pick_dtype, prepare_model, read_model_config, refuse_unsupported


class ModelSkeleton:
    """The model in `folder`, built on the meta device as a worker on a `device` ("cpu", "cuda") builds it.

    The files of its weights are looked at on first use: a folder with a config alone will do to look at `targets`.

    Raises:
        ConfigurationError: there is no such model, or a worker would not serve it.
    """

    def __init__(self, folder: str | Path, *, dtype: str = "auto", device: str = "cuda") -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise ConfigurationError(f"--model {folder}: there is no such folder; a hub id is not looked up here")
        config = read_model_config(str(self.folder))
        refuse_unsupported(config)
        _refuse_quantised(config, self.folder)
        self.dtype = pick_dtype(dtype, torch.device(device), config)
        module = _build(config, self.dtype, self.folder)
        self._prefix: str = module.base_model_prefix
        self._parameters: dict[str, Tensor] = module.state_dict()
        self._transforms = list(get_model_conversion_mapping(module))
        head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
        self.is_tied: bool = head is not None and head.weight is embedding.weight
        served = prepare_model(module, torch.device("meta"), name=config._name_or_path or str(folder), fused=False)
        self.name = served.name
        self.targets = served.targets
        self.edge_targets = served.edge_targets
        self._module = served.module

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The files of the weights. Raises ConfigurationError when they are not there."""
        return Checkpoint(self.folder)

    @cached_property
    def base_weights(self) -> BaseWeights:
        """The embedding and the head, whose values are read from the files when an adapter brings a copy of them."""
        return BaseWeights.of_model(self._module, self._read)

    def weight_of(self, target: TargetModule) -> StoredTensor:
        """Where a module's weight lies.

        Raises:
            ConfigurationError: the files hold it under no name that is known, or in another form than the model's.
        """
        return self.tensor_of(f"{target.name}.weight")

    def tensor_of(self, parameter: str) -> StoredTensor:
        """The same of any parameter, by its name in the model."""
        return self._find(parameter)

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters, by name."""
        return parameter_shapes(self._module)

    @cached_property
    def replaceable(self) -> frozenset[str]:
        """The parameters in whose place an adapter may have its own."""
        return replaceable_parameters(self._module, self.targets)

    def _find(self, parameter: str) -> StoredTensor:
        name = self._stored_names.get(parameter)
        if name is None:
            raise ConfigurationError(
                f"--model {self.folder}: its files do not hold {parameter} as one tensor of that shape"
            )
        return self.checkpoint.tensors[name]

    @cached_property
    def _stored_names(self) -> dict[str, str]:
        """Parameter → tensor in the files, for those that transformers renames at most (`from_pretrained`'s rules)."""
        renamings = [each for each in self._transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in self._transforms if isinstance(each, WeightConverter)]
        names: dict[str, str] = {}
        for name, tensor in sorted(self.checkpoint.tensors.items()):
            parameter, converted = rename_source_key(name, renamings, converters, self._prefix, self._parameters)
            expected = self._parameters.get(parameter)
            if converted is None and expected is not None and tuple(expected.shape) == tensor.shape:
                names[parameter] = name
        return names

    def _read(self, parameter: str) -> Iterator[Tensor]:
        """The elements of the embedding's or the head's parameter; a tied one is stored under one name."""
        if parameter not in self._stored_names and self.is_tied:
            edges = (f"{self.targets[target].name}.weight" for target in self.edge_targets)
            parameter = next((edge for edge in edges if edge in self._stored_names), parameter)
        return self._find(parameter).floats(PIECE_ELEMENTS)


def _build(config: Any, dtype: torch.dtype, folder: Path) -> Any:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=IMPLEMENTATION)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigurationError(f"--model {folder}: {lines[0][:300]}") from error


def _refuse_quantised(config: Any, folder: Path) -> None:
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else type(quantisation).__name__
        raise ConfigurationError(
            f"--model {folder}: is quantised ({method}): name the model in bfloat16, float16 or float32"
        )
