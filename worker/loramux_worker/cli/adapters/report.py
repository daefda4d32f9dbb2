"""What `loramux adapters check` has found out about an adapter, for people and for machines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loramux_schemas.errors import printable
from loramux_worker.cli.adapters.terminal import size_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from loramux_worker.text.tokenizer import Tokenizer

_MAX_VALUES = 4
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class TouchedModule:
    """One module that the adapter adds to; `num_bytes` in the gpu pool."""

    name: str
    rank: int
    alpha: float
    scaling: float
    num_bytes: int

    @property
    def kind(self) -> str:
        """`q_proj`: the name without the layer."""
        return self.name.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """The number in the name."""
        found = _LAYER.search(self.name)
        return None if found is None else int(found[1])


@dataclass(frozen=True, slots=True)
class BroughtText:
    """What an adapter brings of text, and whose is what its requests get; `ends` are (token id, token)."""

    files: tuple[str, ...]
    tokenizer: str
    chat_template: str
    ends: tuple[tuple[int, str], ...]

    @classmethod
    def of(cls, files: tuple[str, ...], own: Tokenizer, base: Tokenizer) -> BroughtText:
        """What the tokenizer of an adapter with these files took over from that of the model."""
        tokenizer = "as the model's"
        if own.pipeline is not base.pipeline:
            more = len(own.pipeline.vocabulary().keys() - base.pipeline.vocabulary().keys())
            tokenizer = f"its own, {more} tokens more" if more else "its own, the same tokens"
        template = "none" if own.chat_template.text is None else "the model's"
        if own.chat_template.owner == "adapter":
            template = "its own"
        return cls(files, tokenizer, template, tuple((i, own.token(i)) for i in own.eos_token_ids))

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "files": self.files,
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
            "eos_token_ids": [token_id for token_id, _ in self.ends],
        }

    def as_lines(self) -> str:
        """For people."""
        ends = ", ".join(f"{printable(token, limit=40)} ({token_id})" for token_id, token in self.ends) or "nothing"
        return (
            f"text: {', '.join(self.files)}\n"
            f"  tokenizer: {self.tokenizer}; chat template: {self.chat_template}; ends with: {ends}"
        )


@dataclass(frozen=True, slots=True)
class Report:
    """One adapter: what it touches and brings, or the code and reason of its refusal."""

    name: str
    revision: str | None = None
    modules: tuple[TouchedModule, ...] = ()
    rank: int = 0
    num_bytes: int = 0
    text: BroughtText | None = None
    own: tuple[tuple[str, int], ...] = ()  # tensors that are no LoRA by kind (`norm.weight`), and how many
    code: str | None = None
    reason: str | None = None

    @property
    def is_served(self) -> bool:
        """Whether a worker would serve it."""
        return self.reason is None

    def groups(self) -> dict[str, list[TouchedModule]]:
        """The modules by kind, in the model's order."""
        groups: dict[str, list[TouchedModule]] = {}
        for module in self.modules:
            groups.setdefault(module.kind, []).append(module)
        return groups

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        if not self.is_served:
            return {"adapter": self.name, "served": False, "code": self.code, "reason": self.reason}
        modules = [
            {
                "module": kind,
                "count": len(group),
                "layers": [module.layer for module in group if module.layer is not None],
                "ranks": sorted({module.rank for module in group}),
                "alphas": sorted({module.alpha for module in group}),
                "scalings": sorted({module.scaling for module in group}),
                "bytes": sum(module.num_bytes for module in group),
            }
            for kind, group in self.groups().items()
        ]
        return {
            "adapter": self.name,
            "served": True,
            "revision": self.revision,
            "rank": self.rank,
            "bytes": self.num_bytes,
            "modules": modules,
            "own": dict(self.own),
            "text": None if self.text is None else self.text.as_json(),
        }

    def as_table(self, dtype: str) -> RenderableType:
        """For people."""
        from rich.table import Table
        from rich.text import Text

        table = Table(show_footer=True)
        count, total = str(len(self.modules)), size_text(self.num_bytes)
        table.add_column("module", footer=f"{count} in {dtype}")
        table.add_column("layers")
        table.add_column("rank", footer=f"max {self.rank}", justify="right")
        table.add_column("alpha", justify="right")
        table.add_column("scaling", justify="right")
        table.add_column("gpu pool", footer=total, justify="right")
        for kind, group in self.groups().items():
            table.add_row(
                Text(kind),
                _ranges([module.layer for module in group if module.layer is not None]),
                _values(module.rank for module in group),
                _values(module.alpha for module in group),
                _values(module.scaling for module in group),
                size_text(sum(module.num_bytes for module in group)),
            )
        return table


def _values(values: Iterable[float]) -> str:
    distinct = sorted(set(values))
    if len(distinct) > _MAX_VALUES:
        return f"{distinct[0]:g} … {distinct[-1]:g}"
    return ", ".join(f"{value:g}" for value in distinct)


def _ranges(layers: Sequence[int]) -> str:
    """`0-3, 7`."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1][1:] = [layer]
        else:
            runs.append([layer])
    return ", ".join("-".join(map(str, run)) for run in runs)
