"""Recognising the base model's own weights in an adapter's file."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from loramux_worker.adapters.targets import TargetModule

PIECE_ELEMENTS = 1 << 24
"""How many elements are compared at a time: bounds the memory that a comparison takes."""


class BaseWeights:
    """The served model's weights of the embedding and the output head, by parameter name (`lm_head.weight`).

    PEFT saves a copy of both beside an adapter that targets one of them, and loading that adapter replaces the base
    model's. A copy that equals the served weights changes nothing and may be dropped; any other cannot be served.
    Digests are computed on first use, since most adapters carry no copy. Thread-safe.

    `read`, where the parameters are on the meta device, yields the elements of one in order, in any float dtype.
    """

    def __init__(self, parameters: Mapping[str, Tensor], read: Callable[[str], Iterable[Tensor]] | None = None) -> None:
        self._parameters = dict(parameters)
        self._read = read
        self._digests: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @classmethod
    def of_model(cls, model: nn.Module, read: Callable[[str], Iterable[Tensor]] | None = None) -> BaseWeights:
        """Those of a Hugging Face causal language model; `read` as in the constructor."""
        modules = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
        return cls(
            {
                f"{name}.{kind}": parameter
                for name, module in model.named_modules(remove_duplicate=False)
                if any(module is wanted for wanted in modules)
                for kind in ("weight", "bias")
                if isinstance(parameter := getattr(module, kind, None), Tensor)
            },
            read,
        )

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a parameter; None when it is not one of these."""
        parameter = self._parameters.get(name)
        return None if parameter is None else tuple(parameter.shape)

    def equal(self, name: str, pieces: Iterable[Tensor]) -> bool:
        """Whether `pieces` (its elements in order, in any float dtype) are the parameter, in the served dtype."""
        dtype = self._parameters[name].dtype
        return _digest(piece.to(dtype) for piece in pieces) == self._digest_of(name)

    def remember(self) -> None:
        """Take the digests now: the parameters are about to change, and what adapters bring copies of is not."""
        for name in self._parameters:
            self._digest_of(name)

    def _digest_of(self, name: str) -> bytes:
        with self._lock:
            if name not in self._digests:
                parameter = self._parameters[name]
                pieces = _pieces(parameter) if self._read is None else self._read(name)
                self._digests[name] = _digest(piece.to(parameter.dtype) for piece in pieces)
            return self._digests[name]


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a served model's parameters, by the names that they have in Hugging Face's."""
    named = model.named_parameters(remove_duplicate=False)
    return {name.replace(".base.", "."): tuple(parameter.shape) for name, parameter in named}


def replaceable_parameters(model: nn.Module, targets: Iterable[TargetModule]) -> frozenset[str]:
    """The parameters in whose place the rows of an adapter may have its own.

    Those of linear layers, of the embedding, and of layers with nothing but vectors of the hidden size, which are
    norms over [1, rows, hidden]. Of other layers it is not known along which axis the rows lie.
    """
    names = {target.name for target in targets}
    hidden = (model.get_input_embeddings().weight.shape[1],)  # type: ignore[operator]
    vectors = {
        name
        for name, module in model.named_modules()
        if module._parameters and all(p is None or tuple(p.shape) == hidden for p in module._parameters.values())
    }
    return frozenset(name for name in parameter_shapes(model) if name.rpartition(".")[0] in names | vectors)


def _pieces(parameter: Tensor) -> Iterator[Tensor]:
    flat = parameter.detach().reshape(-1)
    return (flat[i : i + PIECE_ELEMENTS].cpu() for i in range(0, flat.numel(), PIECE_ELEMENTS))


def _digest(pieces: Iterable[Tensor]) -> bytes:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
